"""Apply a trained run to its test cases or others, at an operating price chosen on validation cases out of fold.

`one_error`: the cheapest price that loses no more than `tolerance`, or than its own standard error where that is
larger, against the best of all prices and static budgets. `within`: the cheapest price whose mean score is at most
`tolerance` below that of the best static budget; no allowance is made for noise. In both, if no price does, the one
that loses least. `evaluation.price` sets it by hand instead, and the objective `dual` by its target.

The result compares an allocator's points on a set of cases with static budgets and controls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.allocator.base import Allocator, Decisions
from frugalpath.allocator.score_table import ScoreTable, chosen
from frugalpath.bootstrap import Bootstrap
from frugalpath.envs.case import Case
from frugalpath.evaluation.controls import best_static, by_question, majority_scores, mean_features
from frugalpath.evaluation.frontier import (
    Paid,
    Point,
    area_of_chosen,
    areas,
    at_operating_point,
    hull,
    lost_to_best,
    mixed,
    oracle_rungs,
    pick_price,
    point,
)
from frugalpath.evaluation.latency import Latency, measured_once
from frugalpath.evaluation.metrics import base_rates, budget_information, calibration, image_kinds, spend
from frugalpath.recipe.run import EvaluationOptions
from frugalpath.rewards.scoring import Scorer


def operating_price(
    decided: Sequence[Decisions],
    table: ScoreTable,
    options: EvaluationOptions,
    bootstrap: Bootstrap,
    fixed: float | None = None,
) -> dict[str, Any]:
    """Choose the operating price and record how.

    Args:
        decided: out-of-fold decisions on the validation cases, one for each price of the curve.
        table: of these cases, the ladder's columns. bootstrap: over them.
        fixed: the price, where no rule chooses it.

    Returns:
        `rule`, `tolerance`, `price`; `val`: of each price `{price, accuracy, flops, lost, error}`, `lost` being what
        the rule compares, with its standard error.
    """
    static = table.score.T
    rivals = list(static) if options.operating == "within" else [*(d.score for d in decided), *static]
    best = max(rivals, key=np.mean)
    lost = [best - d.score for d in decided]
    mean, errors = [float(v.mean()) for v in lost], [bootstrap.error(v) for v in lost]
    costs = [float(d.cost.mean()) for d in decided]
    allowed = errors if options.operating == "one_error" else [0.0] * len(errors)
    chosen = decided[pick_price(mean, allowed, costs, options.tolerance)].price
    rows = zip(decided, costs, mean, errors, strict=True)
    return {
        "rule": options.operating if fixed is None else "price",
        "tolerance": options.tolerance,
        "price": chosen if fixed is None else fixed,
        "val": [
            {"price": d.price, "accuracy": float(d.score.mean()), "flops": c, "lost": m, "error": e}
            for d, c, m, e in rows
        ],
    }


@dataclass(frozen=True)
class Preferred:
    """Choices made on validation cases, to be used for others.

    Args:
        best: rung of the most accurate static budget.
        prices, rungs: corners of the allocator's hull and of that of the static budgets, as indices.
        operating: see `frugalpath.evaluation.run.operating_price`.
    """

    best: int
    prices: np.ndarray
    rungs: np.ndarray
    operating: dict[str, Any]

    @classmethod
    def of(cls, decided: list[Decisions], table: ScoreTable, best: int, operating: dict[str, Any]) -> Preferred:
        """Choose from out-of-fold decisions and the table (the ladder's columns) of the validation cases."""
        prices = hull(np.array([d.cost.mean() for d in decided]), np.array([d.score.mean() for d in decided]))
        return cls(best, prices, hull(table.flops.mean(0), table.score.mean(0)), operating)


@dataclass(frozen=True)
class EvaluationResult:
    """Results on N cases: the performer's answers and the allocator's decisions.

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
        """The table restricted to the ladder's budgets."""
        return self.whole.at(self.ladder)

    @cached_property
    def static(self) -> list[Point]:
        """A point for each budget of the ladder."""
        table, times = self.table, self.latency.budgets(self.ladder)
        columns = zip(table.score.T, table.visual.T, table.flops.T, times, self.ladder, strict=True)
        return [point(s, v, f, self.bootstrap, latency_ms=float(ms), budget=b) for s, v, f, ms, b in columns]

    def adaptive(self, decisions: Decisions) -> tuple[Point, Point]:
        """Points of the allocator and of the random allocator of equal mean budget."""
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
        """Compare the allocator's frontier with the static one, and the operating point in every unit of cost."""
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
        """Gains of the operating point over the controls on the same cases."""
        score, rungs = self.decisions.score, self.decisions.rungs
        rivals = {
            "random": mixed(self.table.score, rungs),
            "text_only": self.whole.at([0]).score[:, 0],
            "majority": self.majority,
        }
        return {f"gain_over_{name}": self.bootstrap.difference(score - other) for name, other in rivals.items()}

    def headline(self, own: Point) -> dict[str, Any]:
        """Main figures of the operating point."""
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
        """Summarize these cases, as in `summary.json`."""
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


class Evaluator:
    """Evaluate a run, with all choices made on its validation cases.

    Args:
        allocator: fitted; it holds the run, its performer and their tables.
    """

    def __init__(self, allocator: Allocator):
        self.allocator, self.data, self.performer = allocator, allocator.data, allocator.performer
        self.ladder, self.options = allocator.ladder, allocator.data.run.evaluation
        self.prices = allocator.prices(self.options.prices)
        self.tables = allocator.trained.tables
        self.val = self.tables["val"]

    def bootstrap(self, table: ScoreTable) -> Bootstrap:
        """Bootstrap over a table's patients."""
        return Bootstrap(table.patients, self.options.bootstrap, self.data.run.grpo.seed)

    @cached_property
    def preferred(self) -> Preferred:
        """Choices made on the validation cases."""
        table = self.val.at(self.ladder)
        decided = [self.allocator.decide("val", p) for p in self.prices]
        fixed = self.options.price if self.options.price is not None else self.allocator.settled
        operating = operating_price(decided, table, self.options, self.bootstrap(table), fixed)
        return Preferred.of(decided, table, best_static(table), operating)

    def on_test(self) -> EvaluationResult:
        """Evaluate the run's test cases."""
        decided = [self.allocator.decide("test", p) for p in (*self.prices, self.preferred.operating["price"])]
        table = self.tables["test"]
        predicted = self.allocator.predicted("test")
        folder = self.data.run.folder / "tables"
        return self._outcome(self.data.splits["test"], table, decided, predicted, self.data.scorer, folder)

    def on(self, cases: Sequence[Case], table: ScoreTable, scorer: Scorer, folder: Path) -> EvaluationResult:
        """Evaluate other cases, whose images are in the performer's bank.

        Args:
            table: of these cases, budget 0 and the ladder's columns.
            folder: where latencies are stored.
        """
        prices, ladder = (*self.prices, self.preferred.operating["price"]), table.at(self.ladder)
        decided = [self.allocator.decide_on(cases, p, ladder) for p in prices]
        return self._outcome(cases, table, decided, self.allocator.values(cases), scorer, folder)

    def _outcome(
        self,
        cases: Sequence[Case],
        table: ScoreTable,
        decided: list[Decisions],
        predicted: np.ndarray | None,
        scorer: Scorer,
        folder: Path,
    ) -> EvaluationResult:
        shown = [self.performer.sources(c) for c in cases]
        val = self.val.at(self.ladder)
        most = self.data.max_new_tokens
        return EvaluationResult(
            ladder=self.ladder,
            cases=list(cases),
            whole=table,
            curve=decided[:-1],
            decisions=decided[-1],
            preferred=self.preferred,
            latency=measured_once(self.performer, self.allocator, cases, decided, most, table, folder),
            bootstrap=self.bootstrap(table),
            predicted=predicted,
            base=base_rates(val.score, val.questions, table.questions),
            kinds=image_kinds(mean_features(list(cases), self.performer.bank), shown),
            majority=majority_scores(self.data.splits["train"], cases, scorer),
        )
