"""A finished run is applied to cases: its own test cases, or others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from envs.case import Case
from envs.score_table import ScoreTable
from models.performer import Performer
from rewards.bootstrap import Bootstrap
from rl.deciders.base import Decider, Decisions
from rl.evaluation.attribution import best_static
from rl.evaluation.calibration import base_rates
from rl.evaluation.controls import majority_scores
from rl.evaluation.information import image_kinds
from rl.evaluation.latency import measured_once
from rl.evaluation.operating import operating_price
from rl.evaluation.outcome import Outcome, Preferred
from rl.probe import mean_features
from rl.scoring import Scorer
from rl.stages import Stages


class Trial:
    """A run whose choices are made on its validation cases.

    Args:
        stages: the run. performer: the trained performer. decider: the allocator.
    """

    def __init__(self, stages: Stages, performer: Performer, decider: Decider):
        self.stages, self.performer, self.decider = stages, performer, decider
        self.ladder, self.options = stages.run.ladder, stages.run.evaluation
        self.prices = decider.prices(self.options.prices)
        self.val = stages.table("grpo", performer, "val")

    def bootstrap(self, table: ScoreTable) -> Bootstrap:
        """Resamples of a table's patients."""
        return Bootstrap(table.patients, self.options.bootstrap, self.stages.run.grpo.seed)

    @cached_property
    def preferred(self) -> Preferred:
        """What the validation cases prefer."""
        table = self.val.at(self.ladder)
        decided = [self.decider.decide("val", p) for p in self.prices]
        fixed = self.options.price if self.options.price is not None else self.decider.settled
        operating = operating_price(decided, table, self.options, self.bootstrap(table), fixed)
        return Preferred.of(decided, table, best_static(table), operating)

    def on_test(self) -> Outcome:
        """What came of the run's test cases."""
        decided = [self.decider.decide("test", p) for p in (*self.prices, self.preferred.operating["price"])]
        table = self.stages.table("grpo", self.performer, "test")
        predicted = self.decider.predicted("test")
        folder = self.stages.run.folder / "tables"
        return self._outcome(self.stages.splits["test"], table, decided, predicted, self.stages.scorer, folder)

    def on(self, cases: Sequence[Case], table: ScoreTable, scorer: Scorer, folder: Path) -> Outcome:
        """What came of other cases, whose images the performer's bank has.

        Args:
            table: of these cases, budget 0 and the ladder's columns.
            folder: where the times of answers are kept.
        """
        prices, ladder = (*self.prices, self.preferred.operating["price"]), table.at(self.ladder)
        decided = [self.decider.decide_on(cases, p, ladder) for p in prices]
        return self._outcome(cases, table, decided, self.decider.values(cases), scorer, folder)

    def _outcome(
        self,
        cases: Sequence[Case],
        table: ScoreTable,
        decided: list[Decisions],
        predicted: np.ndarray | None,
        scorer: Scorer,
        folder: Path,
    ) -> Outcome:
        shown = [self.performer.sources(c) for c in cases]
        val = self.val.at(self.ladder)
        most = self.stages.max_new_tokens
        return Outcome(
            ladder=self.ladder,
            cases=list(cases),
            whole=table,
            curve=decided[:-1],
            decisions=decided[-1],
            preferred=self.preferred,
            latency=measured_once(self.performer, self.decider, cases, decided, most, table, folder),
            bootstrap=self.bootstrap(table),
            predicted=predicted,
            base=base_rates(val.score, val.questions, table.questions),
            kinds=image_kinds(mean_features(list(cases), self.performer.bank), shown),
            majority=majority_scores(self.stages.splits["train"], cases, scorer),
        )
