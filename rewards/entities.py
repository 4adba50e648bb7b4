"""`entity_f1`: whether an open answer affirms and denies the same concepts as the gold text.

Concepts are looked up in a vocabulary: the longest term that stands there counts, whatever its case, hyphens, plural
and British or American spelling. A concept is negated where a phrase such as "no", "negative for", "not identified" or
"absent" has it in its scope; the rules follow NegEx (Chapman et al. 2001) with the scopes of pathology reports. No
model takes part, so that the same text always gives the same concepts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalpath.errors import InputError
from frugalpath.rewards.answer import Completion, extract_answer
from frugalpath.rewards.label import normalise
from frugalpath.rewards.registry import column, reward, warn_unscorable

# An answer longer than this is no report: characters, those outside ASCII (which Unicode may unfold), words and marks.
MAX_CHARS, MAX_FOREIGN, MAX_TOKENS = 20_000, 2_000, 3_000
WINDOW = 30  # tokens at most that a denial reaches

# Numbers, words, a minus that says "negative" ("ER-", "ER (-)"; not "low- and high-grade"), and what ends a scope. A
# full stop ends a sentence, not an initial ("H. pylori").
_TOKEN = re.compile(
    r"[0-9]+(?:[.,][0-9]+)*|[^\W_]+|\(-\)|(?<=\w)-(?!\w)(?! ?(?:and|or|to)\b)"
    r"|[,:;()]|(?<!\b[^\W\d_])[.!?](?=\s|$)"
)
_NOISE = re.compile(r"'s\b|(?<=\w)\(s\)")  # Barrett's, margin(s)
_ENDS = frozenset((".", "!", "?", ";"))
_MINUS = frozenset(("-", "(-)"))
_MARKS = _MINUS | {",", ":", "(", ")"}


def _phrases(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(phrase.split()) for phrase in text.split(","))


# What denies the concepts after it; only "non" is about the very next one.
_BEFORE = _phrases(
    "no,not,without,neither,nor,never,non,no evidence of,no evidence for,no sign of,no signs of,not involved by,"
    "negative for,free of,free from,absence of,absent of,lack of,lacks,lacking,uninvolved by,clear of,devoid of,"
    "without evidence of,no features of,not diagnostic of,no definite,no definitive"
)
# What denies the concepts before it.
_AFTER = _phrases(
    "absent,negative,none,nil,not identified,not seen,not present,not detected,not found,not evident,not noted,"
    "not observed,not appreciated,not demonstrated,none identified,none seen,none present,none detected,is excluded,"
    "ruled out,are excluded,uninvolved,not involved,not expressed,not apparent"
)
# What looks like a denial and is none.
_PSEUDO = _phrases(
    "not only,not necessarily,not certain,not excluded,not be excluded,not entirely excluded,not ruled out,"
    "not be ruled out,cannot rule out,not exclude,not rule out,no change,no significant change,no increase,"
    "cannot exclude"
)
# Values of protocols that say of a concept that it is there and are none themselves.
_AFFIRMED = frozenset(("present", "positive", "identified", "involved", "yes", "true", "seen", "detected"))
_PHRASES = _BEFORE | _AFTER | _PSEUDO
_LENGTHS = {first: sorted({len(p) for p in _PHRASES if p[0] == first}, reverse=True) for first, *_ in _PHRASES}
_STOPS = frozenset(
    ("but", "however", "although", "though", "except", "yet", "while", "whereas", "shows", "showing", "demonstrates",
     "demonstrating", "reveals", "revealing", "has", "contains", "containing")
)  # fmt: skip
_STOPS_AFTER = _STOPS | {":", "(", ")"}
_STOPS_BEFORE = _STOPS | {",", "(", ")", "with"}


@dataclass(frozen=True)
class Vocabulary:
    """Terms to look for.

    Args:
        concepts: normal form of a term -> concept; see `of`.
        lengths: first word of a term -> numbers of words of the terms that start with it, longest first.
    """

    concepts: Mapping[str, str]
    lengths: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, terms: Iterable[tuple[str, str]]) -> Vocabulary:
        """From pairs of term and concept; of terms with the same normal form the first holds.

        A term is found as it is written and without its punctuation.
        """
        concepts: dict[str, str] = {}
        lengths: dict[str, set[int]] = {}
        for term, concept in terms:
            tokens = [_normal_form(token) for sentence in _sentences(term) for token in sentence]
            for words in (tokens, [token for token in tokens if token not in _MARKS]):
                if words:
                    concepts.setdefault(" ".join(words), concept)
                    lengths.setdefault(words[0], set()).add(len(words))
        return cls(concepts, {word: tuple(sorted(found, reverse=True)) for word, found in lengths.items()})

    def term_at(self, words: Sequence[str], at: int) -> int:
        """Number of words of the longest term that starts at a position of words in normal form; 0 for none."""
        for length in self.lengths.get(words[at], ()):
            if at + length <= len(words) and " ".join(words[at : at + length]) in self.concepts:
                return length
        return 0


@functools.cache
def read_vocabulary(path: str | None = None) -> Vocabulary:
    """The vocabulary in a text file, or without one that of the synoptic protocols; read once a process.

    The file has one concept a line, its terms separated by `|`, the first of which names it. Empty lines and comments
    (`#`) are left out.

    Raises:
        InputError: no such file, no term in it, or terms that stand for two concepts, each with its lines.
    """
    if path is None:
        from frugalpath.rewards.synoptic.vocabulary import protocol_vocabulary

        found = protocol_vocabulary().items()
        return Vocabulary.of((term, normalise(concept)) for term, concept in found if normalise(term) not in _AFFIRMED)
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"reward 'entity_f1': `vocabulary` {path!r} cannot be read: {error}") from None
    terms: list[tuple[str, str]] = []
    owner: dict[str, tuple[int, str]] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        written = [term.strip() for term in line.split("|") if term.strip()]
        if line.lstrip().startswith("#") or not written:
            continue
        for term in written:
            form = " ".join(_normal_form(t) for sentence in _sentences(term) for t in sentence if t not in _MARKS)
            first, concept = owner.setdefault(form, (number, written[0]))
            if not form:
                problems.append(f"{path}, line {number}: {term!r} has no letter or digit; remove it")
            elif first != number:
                problems.append(f"{path}, lines {first} and {number}: {term!r} stands for two concepts; keep one")
            terms.append((term, concept))
    if not terms:
        problems.append(f"{path} has no term; write one concept per line, its synonyms separated by |")
    if problems:
        raise InputError(problems)
    return Vocabulary.of(terms)


def find_entities(text: str, vocabulary: Vocabulary) -> dict[str, bool | None]:
    """Concepts in a text: True where one is affirmed, False where it is denied, None where it is both."""
    found: dict[str, bool | None] = {}
    for sentence in _sentences(text):
        for concept, present in _read(sentence, vocabulary):
            found[concept] = present if found.setdefault(concept, present) is present else None
    return found


def entity_f1_score(candidate: str, reference: str, vocabulary: Vocabulary) -> float | None:
    """F1 in 0..1 between the concepts of two texts, each with whether it is affirmed or denied.

    A concept that the candidate both affirms and denies is a false positive. One of which the reference does (one node
    with a metastasis, one without) does not count either way.

    Returns:
        None where the reference has no concept to compare.
    """
    gold = find_entities(reference, vocabulary)
    wanted = {concept: present for concept, present in gold.items() if present is not None}
    if not wanted:
        return None
    given = {c: present for c, present in find_entities(candidate, vocabulary).items() if c in wanted or c not in gold}
    right = sum(given.get(concept) is present for concept, present in wanted.items())
    return 2 * right / (len(given) + len(wanted))


@reward("entity_f1")
def entity_f1(
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    vocabulary: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """F1 between the clinical concepts of the answer and the gold text, denied and affirmed ones apart.

    Args:
        completions: n completions.
        answer: gold texts.
        task: rows of another task than `open` are not scored; without the column all rows are.
        id: names rows in warnings.
        vocabulary: a text file, one concept a line, synonyms separated by `|`; relative to the current folder. By
            default the values of all synoptic protocols with their synonyms.
        columns: not used.

    Returns:
        n values in 0..1, see `entity_f1_score`; 0.0 without an answer and for one longer than any report. None for
        rows of other tasks, and with a warning for rows whose gold text has no concept of the vocabulary.
    """
    n = len(completions)
    terms = read_vocabulary(vocabulary)
    values: list[float | None] = []
    for completion, gold, row_task, row_id in zip(completions, answer, column(task, n), column(id, n), strict=True):
        if row_task not in (None, "open"):
            values.append(None)
            continue
        value = entity_f1_score(extract_answer(completion) or "", gold, terms) if isinstance(gold, str) else None
        if value is None:
            problem = "`answer` has no concept of the vocabulary that it does not also deny"
            warn_unscorable("entity_f1", str(row_id), problem)
        values.append(value)
    return values


def _sentences(text: str) -> list[list[str]]:
    """Tokens of each sentence, a line or what a mark ends; none for a text that is longer than any report.

    A line that ends with a colon is the heading of the next one.
    """
    if len(text) > MAX_CHARS or len(text) - len(text.encode("ascii", "ignore")) > MAX_FOREIGN:
        return []
    sentences: list[list[str]] = [[]]
    for line in text.splitlines():
        for token in _TOKEN.findall(_NOISE.sub("", normalise(line))):
            if token in _ENDS:
                sentences.append([])
            else:
                sentences[-1].append(token)
        if line.rstrip().endswith(":"):
            sentences[-1].append(":")
        else:
            sentences.append([])
    return [s for s in sentences if s] if sum(map(len, sentences)) <= MAX_TOKENS else []


def _normal_form(word: str) -> str:
    """A word in the singular and American spelling; not always a word, but the same for both spellings."""
    word = word.replace("ae", "e").replace("oe", "e").replace("our", "or")
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("ses") and len(word) > 5:  # metastases, diagnoses; biases and cases meet on both sides
        return word[:-3] + "sis"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


def _read(tokens: list[str], vocabulary: Vocabulary) -> list[tuple[str, bool]]:
    """Concepts of one sentence, each with whether it is affirmed."""
    words = [_normal_form(token) for token in tokens]
    terms: dict[int, int] = {}  # first token -> the one after the last
    denials: dict[int, int] = {}
    denied: set[int] = set()
    at = latest = 0
    while at < len(tokens):
        term, phrase = vocabulary.term_at(words, at), _phrase_at(tokens, at)
        if term > phrase:
            terms[at] = at + term
            latest = at
        elif phrase and tuple(tokens[at : at + phrase]) not in _PSEUDO:
            denials[at] = at + phrase
        elif tokens[at] in _MINUS and terms.get(latest) == at:
            denied.add(latest)
        at += max(term, phrase, 1)
    for start, end in denials.items():
        scope = _scope(tokens, start, end, terms)
        denied.update(first for first in scope if first in terms and terms[first] <= scope.stop)
    return [(vocabulary.concepts[" ".join(words[first:last])], first not in denied) for first, last in terms.items()]


def _phrase_at(tokens: Sequence[str], at: int) -> int:
    """Number of tokens of the longest phrase of denial, true or seeming, that starts at a position; 0 for none."""
    for length in _LENGTHS.get(tokens[at], ()):
        if tuple(tokens[at : at + length]) in _PHRASES:
            return length
    return 0


def _scope(tokens: Sequence[str], start: int, end: int, terms: Mapping[int, int]) -> range:
    """The tokens about which the phrase of denial at `start` speaks; `end` is the token after it."""
    phrase = tuple(tokens[start:end])
    before, after = tokens[start - 1] if start else "", tokens[end] if end < len(tokens) else ""
    if phrase == ("non",):
        return range(end, terms.get(end, end))
    if phrase in _BEFORE:
        forward = after == ":" or (after != "" and after not in _MARKS)
        return _following(tokens, end + (after == ":"), _STOPS_AFTER) if forward else _preceding(tokens, start, terms)
    if before == "(" and after == ")":  # ER (negative)
        return _preceding(tokens, start - 1, terms)
    if before in ("", ",", "(", ")", "with", "and") and after not in ("", *_MARKS):  # negative margins
        return _following(tokens, end, _STOPS_AFTER | {"and", "in", "with"})
    return _preceding(tokens, start, terms)


def _following(tokens: Sequence[str], start: int, stops: frozenset[str]) -> range:
    """To what ends the scope; a comma does so unless the list goes on to an "or"."""
    comma = None
    end = min(len(tokens), start + WINDOW)
    for at in range(start, end):
        if tokens[at] in stops:
            end = at
            break
        if tokens[at] in ("or", "nor"):
            comma = None
        elif tokens[at] == "," and comma is None:
            comma = at
    return range(start, end if comma is None else comma)


def _preceding(tokens: Sequence[str], end: int, terms: Mapping[int, int]) -> range:
    """Back to what ends the scope; the colon after a heading does not, unless a term stands after it."""
    named = False
    start = max(end - WINDOW, 0)
    for at in range(end - 1, start - 1, -1):
        if tokens[at] in _STOPS_BEFORE or (tokens[at] == ":" and named):
            start = at + 1
            break
        named = named or at in terms
    return range(start, end)
