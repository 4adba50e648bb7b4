"""The form `escalate`: budgets in sequence, stopped by the performer's own confidence; every look is paid for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.look import CheapLook
from models.allocators.value import ValueAllocator
from models.performer import Performer
from models.reuse import Reader, look_flops
from rl.allocation.escalation import Forecast, Plan, Seen, best_plan, fit_forecast_by_patient, walk
from rl.deciders.base import Decider, Decisions
from rl.frontier import chosen
from rl.stages import Stages
from slides.whole import whole

TIMED = 16
"""Test cases that deciding is timed on."""


class EscalateDecider(Decider):
    """Looks at one budget after another.

    What consecutive prompts begin with is read once, see `models.reuse`; decisions count what is really read and
    written. FLOPs of deciding are those of all looks beyond a fresh answer at the rung where it stops.

    Args:
        stages: the run. performer: its trained performer.
        dividing: the jointly trained allocator, which divides a budget among the slides of a case.
        forecast: fitted on the validation cases; the last fold's fit has seen them all. fold: (N,) of these cases.
    """

    form = "escalate"

    def __init__(
        self, stages: Stages, performer: Performer, dividing: ValueAllocator, forecast: Forecast, fold: np.ndarray
    ):
        self.stages, self.performer, self.dividing = stages, performer, dividing
        self.forecast, self.fold = forecast, fold
        self.ladder = stages.run.ladder
        self.look = CheapLook(performer, dividing.config)
        self._flops: dict[str, np.ndarray] = {}
        self._plans: dict[float, Plan] = {}

    def plan(self, price: float) -> Plan:
        """What is best on validation cases at a price, by fits that had not seen the patient."""
        if price not in self._plans:
            table = self._table("val")
            self._plans[price] = best_plan(
                self.forecast,
                Seen.of_table(table),
                self.fold,
                table.score,
                self.looks("val"),
                self._cost,
                price,
                self._largest,
            )
        return self._plans[price]

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        shares = self.look.divide(self.dividing, cases)
        found = [self._choose(case, price, own) for case, own in zip(cases, shares, strict=True)]
        return np.array([rung for rung, _ in found]), np.array([flops for _, flops in found])

    def _choose(self, case: Case, price: float, shares: Sequence[float] | None) -> tuple[int, float]:
        plan, rungs = self.plan(price), len(self.ladder)
        reader = Reader(self.performer, case, self.stages.max_new_tokens, shares)
        confidence, text, looked = np.full((1, rungs), np.nan), [""] * rungs, np.zeros((1, rungs), dtype=bool)
        spent, rung, to = self._dividing_flops(case), -1, plan.start
        while to > rung:
            rung = to
            answer = reader.answer(self.ladder[rung])
            confidence[0, rung], text[rung], looked[0, rung] = answer.confidence, answer.text, True
            spent += answer.flops
            if rung + 1 < rungs:
                seen = Seen.of(confidence, [text], [case.question])
                expected = self.forecast.expected(seen, rung, looked, self._whole_fit(1))
                to = int(plan.move(expected, rung, self._cost, price)[0])
                spent += self.forecast.flops
        fresh = self.performer.flops(self.performer.prompt(case, self.ladder[rung], shares), answer.generated)
        return rung, spent - fresh

    def decide(self, split: str, price: float) -> Decisions:
        table = self._table(split)
        fold = self.fold if split == "val" else self._whole_fit(len(table.ids))
        rungs, spent = walk(
            self.plan(price), self.forecast, Seen.of_table(table), fold, self.looks(split), self._cost, price
        )
        divided = np.array([self._dividing_flops(c) for c in self.stages.splits[split]])
        return Decisions.from_table(price, table, rungs, spent + divided - chosen(table.flops, rungs))

    def divide(self, cases: Sequence[Case]) -> list[list[float] | None]:
        return self.look.divide(self.dividing, cases)

    def share_look(self, cases: Sequence[Case]) -> np.ndarray:
        return np.array([self._dividing_flops(c) for c in cases])

    def _table(self, split: str) -> ScoreTable:
        return self.stages.table("grpo", self.performer, split).at(self.ladder)

    def looks(self, split: str) -> np.ndarray:
        """FLOPs (N, K + 1, K) of looks at the cases of a split, see `look_flops`."""
        if split not in self._flops:
            cases, written = self.stages.splits[split], self._table(split).generated
            shares = self.look.divide(self.dividing, cases)
            self._flops[split] = np.array(
                [
                    look_flops(self.performer, [self.performer.prompt(case, b, own) for b in self.ladder], tokens)
                    for case, own, tokens in zip(cases, shares, written, strict=True)
                ]
            )
        return self._flops[split]

    @cached_property
    def _largest(self) -> float:
        """FLOPs that a cost of 1 stands for."""
        return float(self.looks("val")[:, 0, -1].mean())

    @cached_property
    def _cost(self) -> np.ndarray:
        return self.looks("val").mean(0) / self._largest

    def _whole_fit(self, count: int) -> np.ndarray:
        return np.full(count, len(self.forecast.weights) - 1)

    def _dividing_flops(self, case: Case) -> float:
        """FLOPs of dividing a budget among the slides of a case."""
        return 0.0 if self.dividing.shares is None else self.dividing.flops(len(self.performer.sources(case)))


def fit_escalate(stages: Stages, performer: Performer, dividing: ValueAllocator, table: ScoreTable) -> EscalateDecider:
    """Fit on the table of the validation cases (in seconds); writes what is done at each price of the evaluation."""
    table = table.at(stages.run.ladder)
    forecast, fold = fit_forecast_by_patient(Seen.of_table(table), table.score, table.patients)
    decider = EscalateDecider(stages, performer, dividing, forecast, fold)
    if stages.is_main:
        plans = [(price, decider.plan(price)) for price in stages.run.evaluation.prices]
        rows = [{"price": p, "start": stages.run.ladder[plan.start], "jump": plan.jump} for p, plan in plans]
        path = stages.run.folder / "allocator" / "escalate.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_text(json.dumps(rows, indent=1))
    return decider
