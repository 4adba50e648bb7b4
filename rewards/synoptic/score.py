"""Scoring a synoptic record against the gold record of its case (the scheme of M 7.6).

Which fields count follows from the gold record alone: those it answers. A field that the gold record marks not
applicable, or whose condition it does not meet, must not be answered; each answer there is a hallucination.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.protocol import Field, Protocol
from frugalpath.rewards.synoptic.report import Report
from frugalpath.rewards.synoptic.similarity import similarity

# A finding is denied by a word shortly before it in its clause, "negative for carcinoma", or right behind it.
_DENIAL = re.compile(
    r"(?<![\w-])(?:no|not|negative|without|absence|absent|free of|lacks)\b(?! (?:special type|otherwise specified))"
)
_DENIED_AFTER = re.compile(r":? (?:(?:is|was) )?(?:absent|not (?:identified|seen|present|found))\b")
_CLAUSE_END = re.compile(r"[,;.]|\b(?:but|however|although|yet)\b")
_NEAR = 60  # characters before a finding in which a denial is looked for
SAME_ENTRY = 0.5  # least similarity of their keys at which two entries of lists are the same finding


@dataclass(frozen=True)
class Cell:
    """One field of one case.

    Args:
        gold, predicted: values; None where not applicable or, for `predicted`, not answered.
        right: whether it is right, exactly or within the tolerance.
        credit: 0..1; more than 0 for a neighbouring grade, some of several values, or some entries of a list.
        attempted: whether the report answers the field at all, readable or not.
    """

    gold: Any
    predicted: Any
    right: bool
    credit: float
    attempted: bool


@dataclass(frozen=True)
class CaseScore:
    """Scores of one case.

    Args:
        cells: field id -> cell, for the fields that the gold record answers; `list.inner` for entries of lists.
        case_score: mean credit of the fields, weighted, in 0..1; None where the gold record answers none.
        hallucinated: ids of fields that are answered though they do not apply.
        critical_errors: ids of fields whose value belongs to another group than the gold's.
        complete: share of the required and applicable fields that the report answers; None where none is required.
        scored: number of fields in `case_score`.
        null_right: number of fields that neither the gold record nor the report answers.
    """

    cells: dict[str, Cell]
    case_score: float | None
    hallucinated: tuple[str, ...]
    critical_errors: tuple[str, ...]
    complete: float | None
    scored: int
    null_right: int
    _protocol: Protocol = field(repr=False, compare=False)

    @property
    def top(self) -> list[Cell]:
        """Cells of whole fields, without those of entries of lists."""
        return [cell for name, cell in self.cells.items() if "." not in name]

    @property
    def non_null_accuracy(self) -> float | None:
        """Share of fields that are right, among those that the gold record answers: the headline."""
        return sum(cell.right for cell in self.top) / self.scored if self.scored else None

    @property
    def coverage(self) -> float | None:
        """Share of the same fields that are attempted."""
        return sum(cell.attempted for cell in self.top) / self.scored if self.scored else None

    @property
    def critical_right(self) -> bool | None:
        """Whether every field of the critical set is right; None where the gold record answers none of them."""
        cells = [self.cells[f.id].right for f in self._protocol.fields if f.critical and f.id in self.cells]
        return all(cells) if cells else None

    def penalised(self, penalty: float = 1.0) -> float | None:
        """The case score less `penalty` fields for every hallucinated one, not below 0: the reward."""
        if self.case_score is None:
            return None
        return max(0.0, self.case_score - penalty * len(self.hallucinated) / self.scored)


def score_case(gold: Mapping[str, Any], predicted: Report, protocol: Protocol) -> CaseScore:
    """Score what `parse_report` read against a gold record of the same protocol.

    A report that answers a field twice, or no field at all, has answered nothing.
    """
    record = predicted.record if predicted.readable else {}
    unreadable = predicted.unreadable if predicted.readable else {}
    cells: dict[str, Cell] = {}
    hallucinated, errors = [], []
    total = weight = 0.0
    scored = required = answered = null_right = 0
    for each in protocol.fields:
        truth, value = gold.get(each.id), record.get(each.id)
        attempted = each.id in record or each.id in unreadable
        if each.required(gold):
            required += 1
            answered += attempted
        if truth is None:
            null_right += value is None and each.id not in unreadable
            if value is not None and value != UNDETERMINED and (each.id in gold or not each.applies(gold)):
                hallucinated.append(each.id)
            continue
        credit, inner = (
            (_list_credit(each, truth, value)) if each.type == "list" else (credit_of(each, truth, value), {})
        )
        cells[each.id] = Cell(truth, value, credit == 1.0, credit, attempted)
        cells |= inner
        scored += 1
        weight += each.weight
        total += each.weight * credit
        if None not in (grave := (_severity(each, truth), _severity(each, value))) and grave[0] != grave[1]:
            errors.append(each.id)
    return CaseScore(
        cells=cells,
        case_score=total / weight if weight else None,
        hallucinated=tuple(hallucinated),
        critical_errors=tuple(errors),
        complete=answered / required if required else None,
        scored=scored,
        null_right=null_right,
        _protocol=protocol,
    )


def credit_of(field: Field, gold: Any, value: Any) -> float:
    """Credit 0..1 of a field's value; 1.0 means right. Null and "cannot be determined" are wrong but as gold."""
    if value is None or gold is None:
        return float(value is gold)
    if value == gold:
        return 1.0
    if UNDETERMINED in (value, gold) or [UNDETERMINED] in (value, gold):
        return 0.0
    if field.type == "multi":
        a, b = ({normalise(v) for v in side} for side in (gold, value))
        return len(a & b) / len(a | b)
    if field.type == "ordinal":
        ranks = field.rank
        if gold not in ranks or value not in ranks or len(ranks) < 3:
            return 0.0
        return max(0.0, 1 - abs(ranks[gold] - ranks[value]) / (len(ranks) - 1))
    if field.type in ("number", "integer"):
        return float(_close(field, gold, value))
    if field.type == "text":
        return float(similarity(str(gold), str(value)) >= field.threshold)
    return float(normalise(str(gold)) == normalise(str(value)))


def deviation(gold: Any, value: Any) -> float | None:
    """Absolute difference of two numbers; None where one is none."""
    plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (gold, value))
    return abs(gold - value) if plain else None


def _close(field: Field, gold: Any, value: Any) -> bool:
    bound_a, a = _bounded(gold)
    bound_b, b = _bounded(value)
    if bound_a != bound_b:
        return False
    absolute, relative = field.tolerance
    return abs(a - b) <= max(absolute, relative * abs(a)) + 1e-9


def _bounded(value: Any) -> tuple[str, float]:
    if isinstance(value, str):
        bound, _, number = value.partition(" ")
        return bound, float(number)
    return "", float(value)


def _list_credit(field: Field, gold: list[dict[str, Any]], value: Any) -> tuple[float, dict[str, Cell]]:
    """Soft F1 of a list, entries matched one to one for the greatest total, and the cells of the gold entries."""
    entries = value if isinstance(value, list) else []
    credits = np.zeros((len(gold), len(entries)))
    for i, truth in enumerate(gold):
        for j, entry in enumerate(entries):
            if _key_similarity(field, truth, entry) >= SAME_ENTRY:
                credits[i, j] = _entry_credit(field, truth, entry)
    rows, columns = linear_sum_assignment(credits, maximize=True) if entries else ([], [])
    match = {i: j for i, j in zip(rows, columns, strict=True) if credits[i, j] > 0}
    total = float(sum(credits[i, j] for i, j in match.items()))
    cells = {}
    for inner in field.fields:
        truths = [
            (t[inner.id], entries[match[i]].get(inner.id) if i in match else None)
            for i, t in enumerate(gold)
            if inner.id in t
        ]
        if truths:
            credit = sum(credit_of(inner, *pair) for pair in truths) / len(truths)
            attempted = any(found is not None for _, found in truths)
            cells[f"{field.id}.{inner.id}"] = Cell(
                [t for t, _ in truths], [v for _, v in truths], credit == 1, credit, attempted
            )
    return 2 * total / (len(gold) + len(entries)), cells


def _key_similarity(field: Field, gold: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    scores = []
    for name in field.key:
        a, b = gold.get(name), entry.get(name)
        if a is None and b is None:
            continue
        text = isinstance(a, str) and isinstance(b, str)
        scores.append(similarity(a, b) if text else credit_of(field.inner[name], a, b))
    return sum(scores) / len(scores) if scores else 0.0


def _entry_credit(field: Field, gold: Mapping[str, Any], entry: Mapping[str, Any]) -> float:
    """Weighted mean over the inner fields that either entry answers."""
    total = weight = 0.0
    for inner in field.fields:
        if inner.id in gold or inner.id in entry:
            weight += inner.weight
            total += inner.weight * credit_of(inner, gold.get(inner.id), entry.get(inner.id))
    return total / weight if weight else 0.0


def _severity(field: Field, value: Any) -> int | None:
    """Position of the gravest group that a value, or an entry of a list, belongs to; None where it is in none."""
    if field.type == "list":
        inner = next((f for f in field.fields if f.groups), None)
        found = (
            [_severity(inner, e.get(inner.id)) for e in value if isinstance(e, Mapping)]
            if inner and isinstance(value, list)
            else []
        )
        return min((s for s in found if s is not None), default=None)
    if not field.groups or value is None:
        return None
    texts = [normalise(str(v)) for v in (value if isinstance(value, list) else [value])]
    free = field.open or field.type == "text"
    last = len(field.groups) - 1
    positions: list[int] = []
    for text in texts:
        for position, words in enumerate(field.groups.values()):
            if text in words:
                positions.append(position)
                break
        else:
            named = [_named(text, words) for words in (field.groups.values() if free else ())]
            if any(found is not None for found in named):
                # A text that only denies findings, as in "negative for carcinoma", is of the least grave group.
                positions.append(named.index(True) if True in named else last)
    return min(positions, default=None)


def _named(text: str, words: frozenset[str]) -> bool | None:
    """Whether a normalised text says one of the words; False where it denies each that it names, None for no word."""
    denied = None
    for match in _any_of(words).finditer(text):
        before = text[max(0, match.start() - _NEAR) : match.start()]
        if match.start() > _NEAR:  # the window may begin within a word
            before = before.partition(" ")[2]
        if not _DENIAL.search(_CLAUSE_END.split(before)[-1]) and not _DENIED_AFTER.match(text, match.end()):
            return True
        denied = False
    return denied


@functools.cache
def _any_of(words: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, words), key=lambda word: (-len(word), word))
    either = "|".join(map(re.escape, longest_first)) or "(?!)"  # a group without words names nothing
    return re.compile(rf"(?<![\w-])(?:{either})(?![\w-])")
