"""What came of an allocator on a set of cases: its points beside static budgets and controls, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from envs.case import Case
from envs.score_table import ScoreTable
from rewards.bootstrap import Bootstrap
from rl.deciders.base import Decisions
from rl.evaluation.calibration import calibration, spend
from rl.evaluation.controls import by_question
from rl.evaluation.information import budget_information
from rl.evaluation.latency import Latency
from rl.frontier.comparison import Paid, area_of_chosen, areas, at_operating_point, hull, lost_to_best
from rl.frontier.points import Point, chosen, mixed, oracle_rungs, point


@dataclass(frozen=True)
class Preferred:
    """What validation cases prefer, which is all that may be chosen for others.

    Args:
        best: rung of the most accurate static budget.
        prices, rungs: corners of the allocator's hull and of that of the static budgets, as indices.
        operating: see `rl.evaluation.operating.operating_price`.
    """

    best: int
    prices: np.ndarray
    rungs: np.ndarray
    operating: dict[str, Any]

    @classmethod
    def of(cls, decided: list[Decisions], table: ScoreTable, best: int, operating: dict[str, Any]) -> Preferred:
        """From out-of-fold decisions and the table (the ladder's columns) of the validation cases."""
        prices = hull(np.array([d.cost.mean() for d in decided]), np.array([d.score.mean() for d in decided]))
        return cls(best, prices, hull(table.flops.mean(0), table.score.mean(0)), operating)


@dataclass(frozen=True)
class Outcome:
    """N cases, the performer's answers to them and the allocator's decisions about them.

    Args:
        cases: in the table's order.
        whole: the performer's table, budget 0 and the ladder's columns.
        curve: decisions at every price. decisions: at the operating price.
        predicted, base: (N, K) predicted scores, None where the form predicts none, and what one would predict without
            looking.
        kinds: (N,) kind of image. majority: (N,) scores of the commonest answer.
    """

    ladder: list[int]
    cases: list[Case]
    whole: ScoreTable
    curve: list[Decisions]
    decisions: Decisions
    preferred: Preferred
    latency: Latency
    bootstrap: Bootstrap
    predicted: np.ndarray | None
    base: np.ndarray
    kinds: np.ndarray
    majority: np.ndarray

    @cached_property
    def table(self) -> ScoreTable:
        """The ladder's columns."""
        return self.whole.at(self.ladder)

    @cached_property
    def static(self) -> list[Point]:
        """A point for each budget of the ladder."""
        table, times = self.table, self.latency.budgets(self.ladder)
        columns = zip(table.score.T, table.visual.T, table.flops.T, times, self.ladder, strict=True)
        return [point(s, v, f, self.bootstrap, latency_ms=float(ms), budget=b) for s, v, f, ms, b in columns]

    def adaptive(self, decisions: Decisions) -> tuple[Point, Point]:
        """The allocator's point, and that of the random allocator of equal mean budget."""
        table, rungs = self.table, decisions.rungs
        milliseconds = float(self.latency.budgets(self.ladder)[rungs].mean())
        own = point(
            decisions.score,
            decisions.visual,
            decisions.flops,
            self.bootstrap,
            float(decisions.look.mean()),
            milliseconds + self.latency.deciding(decisions.price),
            price=decisions.price,
        )
        random = point(
            mixed(table.score, rungs),
            mixed(table.visual, rungs),
            mixed(table.flops, rungs),
            self.bootstrap,
            latency_ms=milliseconds,
            price=decisions.price,
        )
        return own, random

    @cached_property
    def frontier(self) -> dict[str, Any]:
        """The allocator's frontier against the static one, and the operating point in every unit of cost."""
        table, curve = self.table, self.curve
        static = Paid(table.score, table.flops)
        adaptive = Paid(np.stack([d.score for d in curve], 1), np.stack([d.cost for d in curve], 1))
        kept = self.preferred.prices, self.preferred.rungs
        return {
            **areas(adaptive, static, self.bootstrap),
            "chosen_on_val": area_of_chosen(adaptive, static, kept, self.bootstrap),
            "operating": self._operating(static),
        }

    def _operating(self, static: Paid) -> dict[str, Any]:
        """`at_operating_point` in FLOPs, visual tokens and milliseconds."""
        own, n = self.decisions, len(self.cases)
        times = self.latency.budgets(self.ladder)
        deciding = np.full(n, self.latency.deciding(own.price))
        read = np.zeros(n) if own.look_tokens is None else own.look_tokens
        units = {
            "flops": (own.flops, own.look, static.cost),
            "tokens": (own.visual.astype(float), read, self.table.visual.astype(float)),
            "latency_ms": (times[own.rungs], deciding, np.tile(times, (n, 1))),
        }
        return {
            unit: at_operating_point(
                Paid(own.score[:, None], (answer + stage1)[:, None]),
                Paid(static.score, fixed),
                self.ladder,
                self.bootstrap,
                stage1,
            )
            for unit, (answer, stage1, fixed) in units.items()
        }

    @cached_property
    def gains(self) -> dict[str, Any]:
        """What the operating point has over the controls of the same cases."""
        score, rungs = self.decisions.score, self.decisions.rungs
        rivals = {
            "random": mixed(self.table.score, rungs),
            "text_only": self.whole.at([0]).score[:, 0],
            "majority": self.majority,
        }
        return {f"gain_over_{name}": self.bootstrap.difference(score - other) for name, other in rivals.items()}

    def headline(self, own: Point) -> dict[str, Any]:
        """The figures that a claim rests on, of the operating point."""
        table, bootstrap, score, k = self.table, self.bootstrap, self.decisions.score, self.preferred.best
        found, volume = self.frontier["operating"]["flops"], self.frontier["hypervolume"]
        equal = found["equal_accuracy"]["step"]["cost_share"]["value"]
        return {
            "price": self.decisions.price,
            "best_static_budget": self.ladder[k],
            "cost_saved": 1 - found["cost_share"]["value"],
            "cost_saved_vs_static": None if equal is None else 1 - equal,
            "cost_share": found["cost_share"],
            "cost_share_vs_static": found["equal_accuracy"]["step"]["cost_share"],
            "accuracy_lost": bootstrap.difference(table.score[:, k] - score),
            "accuracy_lost_vs_best": lost_to_best(score, table.score, bootstrap),
            "gain_at_equal_cost": found["equal_cost"]["gain"],
            "area_over_static": self.frontier["chosen_on_val"]["linear"],
            **self.gains,
            "hypervolume": volume["adaptive"]["value"],
            "hypervolume_static": volume["static"]["value"],
            "tokens_share": own.tokens / self.static[-1].tokens,
        }

    def summary(self) -> dict[str, Any]:
        """All that is known of these cases alone, as `summary.json` has it."""
        table, decisions = self.table, self.decisions
        pairs = [self.adaptive(d) for d in self.curve]
        own, random = self.adaptive(decisions)
        best = oracle_rungs(table.score, table.flops)
        score, visual, flops = (chosen(v, best) for v in (table.score, table.visual, table.flops))
        oracle = point(score, visual, flops, self.bootstrap)
        blind, nothing = self.whole.at([0]), np.zeros(len(self.cases))
        text_only = point(blind.score[:, 0], blind.visual[:, 0], blind.flops[:, 0], self.bootstrap, budget=0)
        spent = spend(table.score, decisions.visual, decisions.rungs, self.ladder, self.bootstrap)
        scores = None if self.predicted is None else calibration(self.predicted, table.score, self.base, self.ladder)
        return {
            "n": len(self.cases),
            "n_patients": len(set(table.patients)),
            "n_without_patient": sum(not c.patient_named for c in self.cases),
            "static": [p.to_dict() for p in self.static],
            "allocator": [p.to_dict() for p, _ in pairs],
            "random": [p.to_dict() for _, p in pairs],
            "oracle": oracle.to_dict(),
            "text_only": text_only.to_dict(),
            "majority": point(self.majority, nothing, nothing, self.bootstrap, budget=0).to_dict(),
            "operating_point": own.to_dict(),
            "operating_random": random.to_dict(),
            "operating": self.preferred.operating,
            "headline": self.headline(own),
            "frontier": self.frontier,
            "calibration": {"scores": scores, "spend": spent},
            "information": budget_information(decisions.rungs, table.questions, self.kinds),
            "latency": self.latency.to_dict(decisions.price),
            "by_question": by_question(decisions, table),
            "chosen": {str(b): int((decisions.rungs == j).sum()) for j, b in enumerate(self.ladder)},
        }
