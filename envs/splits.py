"""Split by patient, reproducibly: by a hash, never by the order of rows."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence

from frugalpath.envs.case import Case, with_splits
from frugalpath.envs.checks import file_keys, report_keys
from frugalpath.envs.files import FileFacts


def carve(
    cases: Sequence[Case],
    facts: Mapping[str, FileFacts],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    *,
    by_text: bool = True,
) -> list[Case]:
    """Take val and test out of train if the data has none and a fraction is given.

    What belongs together stays together: cases of a patient, copies of a file and, with `by_text`, of a report.
    """
    present = {case.split for case in cases}
    asked = {"val": val_fraction, "test": test_fraction}
    shares = {split: share for split, share in asked.items() if share > 0 and split not in present}
    rows = [i for i, case in enumerate(cases) if case.split == "train"]
    if not shares or not rows:
        return list(cases)
    keys: list[list[Hashable]] = []
    for i in rows:
        own: list[Hashable] = [("patient", cases[i].patient)]
        own += [("file", key) for key in file_keys(cases[i], facts)]
        own += [("text", key) for key in report_keys(cases[i])] if by_text else []
        keys.append(own)
    groups = together(keys)
    # A group goes by its first patient, which does not depend on the order of the rows.
    name: dict[int, str] = {}
    for i, group in zip(rows, groups, strict=True):
        name[group] = min(name.get(group, cases[i].patient), cases[i].patient)
    chosen = assign_splits(
        [name[group] for group in groups],
        [stratum(cases[i]) for i in rows],
        {"train": 1 - sum(shares.values()), **shares},
        seed=seed,
    )
    split = dict(zip(rows, chosen, strict=True))
    return with_splits(cases, [split.get(i, case.split) for i, case in enumerate(cases)])


def limit_cases(cases: Sequence[Case], chosen: Sequence[int], limit: int, seed: int) -> list[int]:
    """At most `limit` of the chosen cases in each split, taken in turn from every answer; indices in order."""
    strata: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in sorted(chosen, key=lambda i: _hash(seed, cases[i].id)):
        strata[cases[i].split][stratum(cases[i])].append(i)
    kept: list[int] = []
    for by_answer in strata.values():
        ranked = [(rank, answer, i) for answer, rows in by_answer.items() for rank, i in enumerate(rows)]
        kept += [i for _, _, i in sorted(ranked)[:limit]]
    return sorted(kept)


def stratum(case: Case) -> str:
    """Stratum of a case: the answer of a choice case, else the kind of question."""
    return f"{case.question}\0{case.answer}" if case.task == "choice" else case.question


def assign_splits(
    units: Sequence[Hashable], strata: Sequence[str], fractions: Mapping[str, float], *, seed: int = 0
) -> list[str]:
    """A split for each row such that a unit (a patient) is never divided and each stratum is spread as asked.

    Units go, the largest first and otherwise in the order of a hash of seed and unit, to the split that they bring
    closest (chi-square) to its share of every stratum, of those with room for them. Strata too small to give each
    split a row count as one.

    Args:
        units: for each row what must stay together.
        strata: for each row what should be spread evenly (the answer).
        fractions: share of the rows for each split; they add up to 1.
        seed: another seed, another split.
    """
    positive = {split: share for split, share in fractions.items() if share > 0}
    sizes = Counter(strata)
    small = 1 / min(positive.values())
    profile: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for unit, stratum in zip(units, strata, strict=True):
        profile[unit][stratum if sizes[stratum] >= small else ""] += 1
    totals: Counter[str] = Counter()
    for own in profile.values():
        totals.update(own)
    held: dict[str, Counter[str]] = {split: Counter() for split in positive}
    filled = dict.fromkeys(positive, 0)
    chosen: dict[Hashable, str] = {}

    def strain(split: str, profile: Counter[str]) -> float:
        """How much the chi-square distance of the split from its target grows when it takes the unit."""
        growth = 0.0
        for stratum, n in profile.items():
            target = positive[split] * totals[stratum]
            growth += n * (2 * (held[split][stratum] - target) + n) / target
        return growth

    for unit in sorted(profile, key=lambda unit: (-profile[unit].total(), _hash(seed, unit))):
        n = profile[unit].total()
        roomy = [split for split in positive if filled[split] + n < positive[split] * len(units) + 1]
        split = min(roomy or positive, key=lambda split: strain(split, profile[unit]))
        held[split].update(profile[unit])
        filled[split] += n
        chosen[unit] = split
    return [chosen[unit] for unit in units]


def together(keys: Sequence[Collection[Hashable]]) -> list[int]:
    """Number the groups of rows that share a key, directly or through other rows (union-find)."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    owner: dict[Hashable, int] = {}
    for row, own in enumerate(keys):
        for key in own:
            parent[root(row)] = root(owner.setdefault(key, row))
    return [root(row) for row in range(len(keys))]


def _hash(seed: int, unit: Hashable) -> str:
    return hashlib.sha256(f"{seed}\0{unit}".encode("utf-8", "surrogateescape")).hexdigest()
