"""`synoptic` and `synoptic_accuracy`: a synoptic report against the gold report of its case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from frugalpath.errors import InputError
from frugalpath.rewards.answer import Completion, extract_answer
from frugalpath.rewards.registry import column, reward, warn_unscorable
from frugalpath.rewards.synoptic.parse import parse_report, read_record
from frugalpath.rewards.synoptic.protocol import Protocol, load_protocol
from frugalpath.rewards.synoptic.score import CaseScore, score_case


@reward("synoptic")
def synoptic(
    completions: Sequence[Completion],
    answer: Sequence[str],
    protocol: Sequence[str | None] | None = None,
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    penalty: float = 1.0,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Case score of a synoptic report: weighted mean credit of the fields that the gold report answers (M 7.6).

    A field that is left out, null or "cannot be determined" is wrong where gold is determinate. Each field answered
    that does not apply to the case costs `penalty` fields. A report without an answer block, that cannot be read, or
    that answers a field twice scores 0, the least there is.

    Args:
        completions: n completions.
        answer: gold reports, in any layout of the protocol.
        protocol: of each row, a name or the path of a YAML file.
        task: rows of another task than `synoptic` are not scored; without the column all rows are.
        id: names rows in warnings.
        penalty: what a hallucinated field costs, in fields; 0 or more.
        log_metric: TRL's; gets the mean credit of every field, `synoptic/<field>`.
        columns: not used.

    Returns:
        n values in 0..1; None for rows of other tasks, and with a warning for rows whose gold report cannot be read.

    Example:
        >>> synoptic(["<answer>Grade: 2</answer>"], answer=["Grade: 2"], protocol=["simulator"])
        [1.0]
    """
    if penalty < 0:
        raise InputError(f"`penalty` is {penalty}; it is subtracted already, so give 0 or more")
    scores = score_completions(completions, answer, protocol, task, id)
    if log_metric is not None:
        _log_fields([s for s in scores if s is not None], log_metric)
    return [None if s is None else s.penalised(penalty) for s in scores]


@reward("synoptic_accuracy")
def synoptic_accuracy(
    completions: Sequence[Completion],
    answer: Sequence[str],
    protocol: Sequence[str | None] | None = None,
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Share of the fields that are right, without partial credit, among those the gold report answers.

    For evaluation: it is the non-null accuracy. It does not see hallucinated fields. Arguments as for `synoptic`.
    """
    return [
        None if s is None else s.non_null_accuracy for s in score_completions(completions, answer, protocol, task, id)
    ]


def score_completions(
    completions: Sequence[Completion],
    answer: Sequence[str],
    protocol: Sequence[str | None] | None,
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
) -> list[CaseScore | None]:
    """Score of every completion of a batch; None as `synoptic` says."""
    n = len(completions)
    scores: list[CaseScore | None] = []
    for completion, gold_text, name, row_task, row_id in zip(
        completions, answer, column(protocol, n), column(task, n), column(id, n), strict=True
    ):
        if row_task not in (None, "synoptic"):
            scores.append(None)
            continue
        gold, problem = gold_record(str(gold_text), None if name is None else str(name))
        if gold is None:
            warn_unscorable("synoptic", str(row_id), problem)
            scores.append(None)
            continue
        record, kind = gold
        scores.append(score_case(record, parse_report(extract_answer(completion) or "", kind), kind))
    return scores


def score_report(text: str, gold: str | Mapping[str, Any], protocol: str | Path | Protocol) -> CaseScore:
    """Score of one synoptic report.

    Args:
        text: the report, or a completion whose `<answer>` holds it.
        gold: the gold report, or its record: field ids or names and their values.
        protocol: name of a protocol, a file of one, or what `load_protocol` read.

    Raises:
        InputError: there is no such protocol, or the gold report cannot be read whole.
    """
    kind = protocol if isinstance(protocol, Protocol) else load_protocol(protocol)
    truth = parse_report(gold, kind) if isinstance(gold, str) else read_record(gold, kind)
    if truth.problems:
        raise InputError(f"gold report: {problem}" for problem in truth.problems)
    return score_case(truth.record, parse_report(extract_answer(text) or text, kind), kind)


@functools.lru_cache(maxsize=8192)
def gold_record(text: str, name: str | None) -> tuple[tuple[dict[str, Any], Protocol] | None, str]:
    """Record and protocol of a gold report; None with what is wrong where it cannot be read whole."""
    if name is None:
        return None, "the row names no `protocol`"
    try:
        protocol = load_protocol(name)
    except InputError as error:
        return None, str(error)
    report = parse_report(text, protocol)
    if report.problems:
        # Its text stays out of the log: `frugalpath validate` shows it.
        bad = ", ".join([*report.unreadable, *report.repeated]) or "none"
        return None, f"gold report: fields not read: {bad}; lines of no field: {len(report.unknown)}"
    if all(value is None for value in report.record.values()):
        return None, "the gold report answers none of the fields"
    return (report.record, protocol), ""


def _log_fields(scores: Sequence[CaseScore], log_metric: Callable[[str, float], None]) -> None:
    credits: dict[str, list[float]] = {}
    for score in scores:
        for name, cell in score.cells.items():
            credits.setdefault(name, []).append(cell.credit)
    for name, values in credits.items():
        log_metric(f"synoptic/{name}", sum(values) / len(values))
