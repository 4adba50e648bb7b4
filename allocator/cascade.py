"""The form `cascade`: budgets in sequence, stopped by the performer's own confidence; every look is paid for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from frugalpath.allocator.base import Allocator, Answered, Decisions, TrainedRun
from frugalpath.allocator.cascade_plan import Experience, Plan, walk
from frugalpath.allocator.fitting import check_fitted_on
from frugalpath.allocator.forecast import Observations, fit_forecast_by_patient
from frugalpath.allocator.score_table import ScoreTable, chosen
from frugalpath.distributed import is_main
from frugalpath.envs.case import Case
from frugalpath.files import write_text
from frugalpath.models.performer import Answer, Performer
from frugalpath.models.reuse import Reader, look_flops

KEPT = "escalation.npz"
"""File of the folder `allocator` with what was learnt."""


@dataclass(frozen=True)
class _Looks:
    """Looks at one case: rungs in order, FLOPs of all with those of deciding, the answer that is kept and its rung,
    and the seconds of everything else."""

    rungs: list[int]
    flops: float
    best: int
    answer: Answer
    seconds: float


class CascadeAllocator(Allocator):
    """Looks at one budget after another.

    What consecutive prompts begin with is read once, see `models.reuse`; decisions count what is really read and
    written. It decides for the budget whose answer it keeps, which need not be the last; FLOPs of deciding are those
    of all looks beyond a fresh answer at that one.

    Args:
        trained: the run. known: from its validation cases.
    """

    form = "cascade"

    def __init__(self, trained: TrainedRun, known: Experience):
        super().__init__(trained)
        self.known = known
        self._flops: dict[str | tuple[str, ...], np.ndarray] = {"val": known.flops}
        self._plans: dict[tuple[float, str | None], Plan] = {}

    def plan(self, price: float, known: Experience) -> Plan:
        """What is best at a price on validation cases, all or of one kind."""
        key = price, known.kind
        if key not in self._plans:
            self._plans[key] = known.plan(price)
        return self._plans[key]

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        found = [self._look_on(case, price) for case in cases]
        fresh = [self._fresh(case, looks) for case, looks in zip(cases, found, strict=True)]
        return np.array([looks.best for looks in found]), np.array([looks.flops for looks in found]) - np.array(fresh)

    def answer(self, case: Case, price: float) -> Answered:
        looks = self._look_on(case, price)
        found, fresh = looks.answer, self._fresh(case, looks)
        return Answered(
            text=found.text,
            budget=self.ladder[looks.best],
            looks=tuple(self.ladder[rung] for rung in looks.rungs),
            visual=found.visual,
            prompt=found.prompt,
            generated=found.generated,
            look_flops=looks.flops - fresh,
            flops=fresh,
            look_ms=1000 * looks.seconds,
            ms=1000 * found.seconds,
            confidence=found.confidence,
        )

    def look_ms(self, cases: Sequence[Case], price: float) -> np.ndarray:
        return 1000 * np.array([self._look_on(case, price).seconds for case in cases])

    def _look_on(self, case: Case, price: float) -> _Looks:
        known, rungs = self.known.about(case.question), len(self.ladder)
        plan = self.plan(price, known)
        start = time.perf_counter()
        reader = Reader(self.performer, case, self.data.max_new_tokens)
        confidence, text, looked = np.full((1, rungs), np.nan), [""] * rungs, np.zeros((1, rungs), dtype=bool)
        given: dict[int, Answer] = {}
        spent, to = 0.0, plan.start
        while to not in given:
            rung = to
            answer = given[rung] = reader.answer(self.ladder[rung])
            confidence[0, rung], text[rung], looked[0, rung] = answer.confidence, answer.text, True
            spent += answer.flops
            seen = Observations.of(confidence, [text], [case.question])
            if rung + 1 < rungs:
                expected = known.forecast.expected(seen, rung, looked, known.whole(1))
                to = int(plan.move(expected, rung, known.cost, price)[0])
                spent += known.forecast.flops
        best = int(known.forecast.best(seen, looked, known.whole(1))[0])
        return _Looks(list(given), spent, best, given[best], time.perf_counter() - start - given[best].seconds)

    def _fresh(self, case: Case, looks: _Looks) -> float:
        """FLOPs of the kept answer alone, without what earlier looks spare it."""
        prompt = self.performer.prompt(case, self.ladder[looks.best])
        return self.performer.flops(prompt, looks.answer.generated)

    def decide(self, split: str, price: float) -> Decisions:
        table = self.trained.tables[split].at(self.ladder)
        fold = self.known.fold if split == "val" else self.known.whole(len(table.ids))
        return self._decided(price, table, fold, self.looks(split))

    def decide_on(self, cases: Sequence[Case], price: float, table: ScoreTable) -> Decisions:
        # The table has every answer that looking would give.
        key = tuple(c.id for c in cases)
        if key not in self._flops:
            self._flops[key] = _all_looks(self.performer, cases, table)
        return self._decided(price, table, self.known.whole(len(cases)), self._flops[key])

    def _decided(self, price: float, table: ScoreTable, fold: np.ndarray, looks: np.ndarray) -> Decisions:
        seen = Observations.of_table(table)
        rungs, spent, looked = np.zeros(len(looks), dtype=int), np.zeros(len(looks)), np.zeros(table.score.shape, bool)
        for kind in np.unique(seen.questions).tolist():
            at, known = np.flatnonzero(seen.questions == kind), self.known.about(kind)
            own = walk(self.plan(price, known), known.forecast, seen.at(at), fold[at], looks[at], known.cost, price)
            rungs[at], spent[at], looked[at] = own
        found = Decisions.from_table(price, table, rungs, spent - chosen(table.flops, rungs))
        return replace(found, look_tokens=(table.visual * looked).sum(1) - found.visual)

    def looks(self, split: str) -> np.ndarray:
        """FLOPs (N, K + 1, K) of looks at the cases of a split, see `look_flops`."""
        if split not in self._flops:
            table = self.trained.tables[split].at(self.ladder)
            self._flops[split] = _all_looks(self.performer, self.data.splits[split], table)
        return self._flops[split]


def fit_cascade(trained: TrainedRun) -> CascadeAllocator:
    """Learn from the validation cases' table and write it, with what is done at each price of the evaluation."""
    run, performer = trained.data.run, trained.performer
    table = trained.tables["val"].at(run.ladder)
    seen = Observations.of_table(table)
    forecast, fold = fit_forecast_by_patient(seen, table.score, table.patients)
    flops = _all_looks(performer, trained.data.splits["val"], table)
    allocator = CascadeAllocator(trained, Experience(forecast, fold, seen, table.score, flops))
    if is_main():
        folder = run.folder / "allocator"
        folder.mkdir(parents=True, exist_ok=True)
        known = (allocator.known, *allocator.known.kinds.values())
        plans = [(p, part.kind, allocator.plan(p, part)) for p in run.evaluation.prices for part in known]
        rows = [
            {"price": p, "question": kind, "start": run.ladder[plan.start], "jump": plan.jump}
            for p, kind, plan in plans
        ]
        write_text(folder / "escalate.json", json.dumps(rows, indent=1) + "\n")
        allocator.known.save(folder / KEPT)
    return allocator


def load_cascade(trained: TrainedRun) -> CascadeAllocator:
    """Read what `fit_cascade` left in the run's folder.

    Raises:
        InputError: it was fitted on other scores of the validation cases than there are now.
    """
    known = Experience.load(trained.data.run.folder / "allocator" / KEPT)
    if "val" in trained.tables:
        table = trained.tables["val"].at(trained.data.run.ladder)
        same = known.score.shape == table.score.shape and np.array_equal(known.score, table.score)
        check_fitted_on(trained, table.digest if same else "")
    return CascadeAllocator(trained, known)


def _all_looks(performer: Performer, cases: Sequence[Case], table: ScoreTable) -> np.ndarray:
    """FLOPs (N, K + 1, K) of looks at the cases of a table."""
    found = []
    for case, written in zip(cases, table.generated, strict=True):
        prompts = [performer.prompt(case, b) for b in table.budgets]
        found.append(look_flops(performer, prompts, written))
    return np.array(found)
