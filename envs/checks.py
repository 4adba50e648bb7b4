"""Checks over all cases together, before any training: leaks between splits, copies, empty splits."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence

from frugalpath.envs.case import SPLITS, Case, faulty_cases
from frugalpath.envs.files import FileFacts, inspect_files
from frugalpath.errors import InputError
from frugalpath.slides.images import MAX_PIXELS

logger = logging.getLogger(__name__)

REPORT_WORDS = 4  # an open answer of fewer words ("no", "high grade") repeats by nature; a report does not
_NAMED = 6  # rows that one message names before it only counts the rest


def check_cases(
    cases: Sequence[Case],
    *,
    where: Sequence[str] | None = None,
    need: Collection[str] = (),
    allow_shared_text: bool = False,
    max_pixels: int = MAX_PIXELS,
    facts: Mapping[str, FileFacts] | None = None,
) -> None:
    """Check every case and all of them together; patients and report texts are never quoted, rows are.

    Args:
        cases: of all splits.
        where: position of each case, as `file:line`; default: its id.
        need: splits that must hold cases.
        allow_shared_text: allow the same open or synoptic answer in several splits.
        max_pixels: limit for images, see `frugalpath.envs.files.inspect_files`.
        facts: result of `inspect_files`, to inspect the files only once.

    Raises:
        InputError: with all problems found.
    """
    at = where if where is not None else [f"case {case.id!r}" for case in cases]
    problems = [f"{at[i]}: {problem}" for i in faulty_cases(cases) for problem in cases[i].problems()]
    if not cases:
        problems.append("there are no cases; check path, format and filters")
    problems += _repeated_ids(cases, at)
    if facts is None:
        facts, broken = inspect_files(
            (path for case in cases for path in case.images),
            (path for case in cases for path in case.slides),
            max_pixels=max_pixels,
        )
        problems += file_problems(cases, at, broken)
        warn_of_lost_slides(cases, broken)
    patients = [(case.patient,) for case in cases]
    problems += _across(cases, at, patients, "one patient is in several splits", _SAME_SPLIT)
    files = [file_keys(case, facts) for case in cases]
    problems += _across(cases, at, files, "one image or slide (or a copy of it) is in several splits", _COPY)
    if not allow_shared_text:
        texts = [report_keys(case) for case in cases]
        problems += _across(cases, at, texts, "one report text is in several splits", _TEXT)
    problems += _contradictions(cases, at, facts, files)
    counts = Counter(case.split for case in cases)
    problems += [_empty(split, counts) for split in need if cases and not counts[split]]
    if problems:
        raise InputError(problems)


def _repeated_ids(cases: Sequence[Case], at: Sequence[str]) -> list[str]:
    if len({case.id for case in cases}) == len(cases):
        return []
    first: dict[str, int] = {}
    return [
        f"{at[i]}: the id {case.id!r} was already given at {at[first[case.id]]}; ids must be unique"
        for i, case in enumerate(cases)
        if first.setdefault(case.id, i) != i
    ]


def select(cases: Sequence[Case], split: str) -> list[Case]:
    """The cases of one split.

    Raises:
        InputError: it is empty.
    """
    chosen = [case for case in cases if case.split == split]
    if not chosen:
        raise InputError(_empty(split, Counter(case.split for case in cases)))
    return chosen


def drop_copies(cases: Sequence[Case], facts: Mapping[str, FileFacts]) -> list[bool]:
    """Choose the cases to keep so that no image or slide is in two splits: test has priority, then val."""
    owner: dict[str, int] = {}
    for case in cases:
        for key in file_keys(case, facts):
            owner[key] = max(owner.get(key, 0), SPLITS.index(case.split))
    return [all(owner[key] == SPLITS.index(case.split) for key in file_keys(case, facts)) for case in cases]


def file_keys(case: Case, facts: Mapping[str, FileFacts]) -> list[str]:
    """Content hashes of a case's readable files."""
    return [facts[path].digest for path in (*case.images, *case.slides) if path in facts]


def report_keys(case: Case) -> list[str]:
    """Answer text that must not be in two splits: synoptic, or open and as long as a report."""
    if case.task not in ("open", "synoptic"):
        return []
    words = case.answer.casefold().split()
    return [" ".join(words)] if case.task == "synoptic" or len(words) >= REPORT_WORDS else []


def file_problems(cases: Sequence[Case], at: Sequence[str], broken: Mapping[str, str]) -> list[str]:
    """One message per row with an unusable file, except for slides that a case can do without.

    Images are not left out: they are all decoded before a run starts and soon put right, where slides show what is
    wrong with them one by one, hours into the extraction of thousands.
    """
    if not broken:
        return []
    return [
        f"{at[i]}: {path} {broken[path]}"
        for i, case in enumerate(cases)
        for path in (*case.images, *case.slides)
        if path in broken and path not in _spared(case, broken)
    ]


def warn_of_lost_slides(cases: Sequence[Case], broken: Mapping[str, str]) -> None:
    """Warn once of all unusable slides in cases that have others."""
    lost = {path: broken[path] for case in cases for path in _spared(case, broken)} if broken else {}
    if lost:
        touched = sum(bool(_spared(case, broken)) for case in cases)
        names = _name([f"{path} {reason}" for path, reason in lost.items()])
        logger.warning(
            "%d slides are left out, %d cases go on with what else they show: %s", len(lost), touched, names
        )


def _spared(case: Case, broken: Mapping[str, str]) -> list[str]:
    """Unusable slides of a case that has other inputs."""
    lost = [path for path in case.slides if path in broken]
    return lost if any(path not in broken for path in (*case.images, *case.slides)) else []


_SAME_SPLIT = "put all its rows in one split"
_COPY = "keep it in one split, or set duplicates: drop to leave the copies out of the earlier split"
_TEXT = (
    "keep all rows of a text in one split, or set allow_shared_text: true where equal answers are expected "
    "(a short answer, few fields)"
)


def _across(cases, at, keys: Sequence[Sequence[Hashable]], what: str, remedy: str) -> list[str]:
    """A message for each key that occurs in more than one split, naming the rows of each split.

    `keys` are those of each case.
    """
    first: dict[Hashable, str] = {}
    torn: set[Hashable] = set()
    for case, own in zip(cases, keys, strict=True):
        for key in own:
            if first.setdefault(key, case.split) != case.split:
                torn.add(key)
    if not torn:
        return []
    seen: dict[Hashable, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for i, case in enumerate(cases):
        for key in dict.fromkeys(keys[i]):
            if key in torn:
                seen[key][case.split].append(at[i])
    messages = []
    for splits in seen.values():
        if len(splits) > 1:
            named = "; ".join(f"{split}: {_name(places)}" for split, places in sorted(splits.items()))
            messages.append(f"{what}: {named}. Remedy: {remedy}")
    return messages


def _contradictions(cases, at, facts: Mapping[str, FileFacts], files: Sequence[Sequence[str]]) -> list[str]:
    """Find questions about the same pixels with different answers; `files` are the `file_keys` of each case."""
    first = {i: keys[0] for i, keys in enumerate(files) if keys and cases[i].task == "choice"}
    times = Counter(first.values())
    seen: dict[tuple, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for i, key in first.items() if len(times) < len(first) else ():
        if times[key] == 1:
            continue
        case = cases[i]
        # A slide that is not there still tells two cases apart.
        shown = [facts[path].digest if path in facts else path for path in (*case.images, *case.slides)]
        # In their order: "which slide" has another answer in another one.
        seen[case.prompt, tuple(shown)][case.answer].append(at[i])
    return [
        "the same question about the same image has different answers: "
        + "; ".join(f"{answer!r}: {_name(places)}" for answer, places in answers.items())
        + ". Remedy: keep the right one"
        for answers in seen.values()
        if len(answers) > 1
    ]


def _name(places: Sequence[str]) -> str:
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return ", ".join(places[:_NAMED]) + more


def _empty(split: str, counts: Mapping[str, int]) -> str:
    present = ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n) or "nothing"
    return (
        f"no cases in the split {split!r} (present: {present}); name the splits in the data, "
        "or set val_fraction and test_fraction to take them out of train"
    )
