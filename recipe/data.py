"""From a recipe to cases with stored features and rewards that can score them: all checks come before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState

from frugalpath.envs.case import Case
from frugalpath.envs.registry import make_env
from frugalpath.errors import InputError
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.models.sharded import load_whole
from frugalpath.recipe.features import load_features
from frugalpath.recipe.run import Run
from frugalpath.rewards.registry import RewardFunction, get_rewards, gold_completion
from frugalpath.rewards.scoring import Scorer
from frugalpath.slides.content import file_digests


@dataclass(frozen=True, eq=False)
class RunData:
    """What all stages of a run read: its cases, rewards and stored features.

    Args:
        run: the parsed recipe.
        all_splits: cases by split, of all kinds of question.
        rewards: none where no answer is to be scored.
        features: folder of the features; None is the recipe's.
    """

    run: Run
    all_splits: Mapping[str, list[Case]]
    rewards: Sequence[RewardFunction] = ()
    features: Path | None = None

    @cached_property
    def splits(self) -> dict[str, list[Case]]:
        """Cases by split, of the kinds of question that the run is about."""
        asked = self.run.questions
        return {s: list(with_questions(members, asked, "questions")) for s, members in self.all_splits.items()}

    @property
    def cases(self) -> list[Case]:
        """All cases of `splits`."""
        return [c for members in self.splits.values() for c in members]

    @cached_property
    def bank(self) -> FeatureBank:
        """Stored features of all cases; those that are missing are made."""
        cases = [c for members in self.all_splits.values() for c in members]
        return load_features(cases, self.run.encoder, self.features or self.run.feature_folder)

    @cached_property
    def scorer(self) -> Scorer:
        """What gives an answer its score."""
        return Scorer(self.rewards, self.run.ladder[-1])

    def digest(self, split: str) -> str:
        """SHA-256 of the cases of `all_splits`, see `cases_digest`."""
        if split not in self._digests:
            self._digests[split] = cases_digest(self.all_splits[split])
        return self._digests[split]

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    @property
    def max_new_tokens(self) -> int:
        """Tokens that an answer may have."""
        return self.run.evaluation.max_new_tokens or self.run.grpo.max_completion_length


def load_data(run: Run) -> RunData:
    """Cases and rewards of a recipe, checked; features are made when they are first asked for.

    Raises:
        InputError: see `load_cases` and `load_rewards`.
    """
    load_whole()
    data = RunData(run, load_cases(run))
    return replace(data, rewards=load_rewards(run, data.cases))


def with_questions(cases: Sequence[Case], questions: Sequence[str] | None, where: str) -> Sequence[Case]:
    """The cases of some kinds of question; all for None.

    Raises:
        InputError: there are none.
    """
    if questions is None:
        return cases
    found = [c for c in cases if c.question in questions]
    if not found:
        known = ", ".join(sorted({c.question for c in cases}))
        raise InputError(f"{where}: no case asks {', '.join(questions)}; there are {known}")
    return found


def load_cases(run: Run) -> dict[str, list[Case]]:
    """Cases of the recipe's environment by split; the first process makes generated ones, the others read them.

    Raises:
        InputError: a split is empty, or a kind of question is asked for that there is not.
    """
    params = {k: v for k, v in run.cases.items() if k != "name"}
    with PartialState().main_process_first():
        cases = make_env(run.cases["name"], params, run.base)
    splits = {s: [c for c in cases if c.split == s] for s in ("train", "val", "test")}
    empty = [s for s, members in splits.items() if not members]
    if empty:
        raise InputError(
            f"cases: no case in split {' and '.join(empty)} ({len(cases)} cases in all); every run needs train, val "
            "(allocator, choices) and test (report): state the splits in the manifest or let the environment make them"
        )
    patients = {c.patient for c in splits["val"]}
    if len(patients) < 2:
        raise InputError(
            f"cases: the val split has one patient, {min(patients)}; the allocator is fitted and tested on different "
            "ones, so give it at least two"
        )
    check_questions(run, {c.question for c in cases})
    if run.balance:
        splits["train"] = balanced(splits["train"])
    return splits


def check_questions(run: Run, known: Collection[str]) -> None:
    """Refuse kinds of question that no case asks, for all stages at once."""
    named = {"questions": run.questions, **{f"sft.{s.kind}.questions": s.options.get("questions") for s in run.sft}}
    problems = []
    for where, kinds in named.items():
        if isinstance(kinds, str):
            problems.append(f"{where}: {kinds!r}: give a list, [{kinds}]")
            continue
        unknown = [str(kind) for kind in kinds or () if kind not in known]
        if unknown:
            problems.append(f"{where}: no case asks {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if problems:
        raise InputError(problems)


def balanced(cases: Sequence[Case]) -> list[Case]:
    """Repeat the cases of rare answers, within each choice question, up to the number of the commonest answer."""
    groups: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        key = case.answer if case.task == "choice" else ""
        groups.setdefault(case.question, {}).setdefault(key, []).append(case)
    out = []
    for answers in groups.values():
        most = max(map(len, answers.values()))
        out += [members[i % len(members)] for members in answers.values() for i in range(most)]
    return out


def load_rewards(run: Run, cases: Sequence[Case]) -> list[RewardFunction]:
    """The recipe's rewards, checked: the gold answer of the first cases of every question must score 1."""
    rewards = get_rewards(run.rewards, base=run.base)
    scorer = Scorer(rewards, run.ladder[-1])
    by_question: dict[str, Case] = {}
    for case in cases:
        by_question.setdefault(case.question, case)
    probes = list(by_question.values())
    gold = [gold_completion({"answer": c.answer}) for c in probes]
    scores = scorer(gold, probes, [1] * len(probes), [1] * len(probes))
    problems = [
        f"case {c.id}: its gold answer {c.answer!r} scores {s:.3f} under `rewards`, not 1; "
        "mend the answer or the reward, or set `scores: false` for a reward that only shapes training"
        for c, s in zip(probes, scores, strict=True)
        if abs(s - 1) > 1e-6
    ]
    if problems:
        raise InputError(problems)
    return rewards


def cases_digest(cases: Sequence[Case]) -> str:
    """SHA-256 of cases in their order: every field, and what their images and slides hold; not where these lie."""
    files = list(dict.fromkeys(p for c in cases for p in (*c.images, *c.slides)))
    digests, _ = file_digests(files)
    names = [f.name for f in dataclasses.fields(Case)]
    rows = []
    for case in cases:
        row = {name: getattr(case, name) for name in names}
        row |= {k: [digests.get(p, p) for p in row[k]] for k in ("images", "slides")}
        rows.append(row)
    return sha256_of(rows)


def sha256_of(content: Any) -> str:
    """Hex digest of content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
