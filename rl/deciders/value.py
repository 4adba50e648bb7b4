"""The form `value`: predicted scores from the cheapest look, minus price times cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.glance import Glance
from models.allocators.network import widened
from models.allocators.value import ValueAllocator
from models.performer import Performer
from rl.allocation.fitting import Regression, predict
from rl.deciders.base import Decisions
from rl.deciders.fitted import fitted, read_fit
from rl.deciders.network import NetworkDecider
from rl.frontier import chosen
from rl.recipe import AllocatorOptions
from rl.stages import Stages

SAMPLED = 100
"""Validation cases that mean costs are taken from."""


class ValueDecider(NetworkDecider):
    """A fitted value allocator; `held_out` are predicted scores (N, rungs)."""

    form = "value"
    allocator: ValueAllocator

    def __init__(
        self,
        stages: Stages,
        performer: Performer,
        allocator: ValueAllocator,
        held_out: np.ndarray,
        cost: Sequence[float] | None = None,
    ):
        super().__init__(stages, performer, allocator, held_out)
        self._added: dict[str, np.ndarray] = {}
        if cost is None:
            cost = np.array(self.objective.cost) - self._spared_share()
        self.objective = replace(self.objective, cost=tuple(cost))

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        return {"val": self.held_out, "test": predict(self.allocator, *self._seen)}

    def values(self, cases: Sequence[Case]) -> np.ndarray:
        return predict(self.allocator, *self.look(cases))

    def predicted(self, split: str) -> np.ndarray:
        return self._values[split]

    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        return self.objective.best(predict(self.allocator, look, question), price)

    def held_out_rungs(self, price: float) -> np.ndarray:
        return self.objective.best(self.held_out, price)

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        look, question = self.look(cases)
        rungs = self.rungs(look, question, price)
        glances = [self._glance(*each) for each in zip(cases, rungs, strict=True)]
        return rungs, self._look_flops(cases) + np.array(glances)

    def decide(self, split: str, price: float) -> Decisions:
        found = super().decide(split, price)
        return replace(found, look=found.look + chosen(self._glances(split), found.rungs))

    def _glances(self, split: str) -> np.ndarray:
        """FLOPs (N, rungs) that a glance adds to the answer at each rung."""
        if split not in self._added:
            cases = self.stages.splits[split]
            added = np.zeros((len(cases), len(self.ladder)))
            if self.look.glance is not None:
                for row, case in zip(added, cases, strict=True):
                    row[:] = [self._glance(case, rung) for rung in range(len(self.ladder))]
            self._added[split] = added
        return self._added[split]

    def _glance(self, case: Case, rung: int) -> float:
        """FLOPs that a glance adds to the answer at a rung: what the answer takes over is not paid twice."""
        glance = self.look.glance
        if glance is None:
            return 0.0
        return glance.flops(case) - glance.spared(case, self.performer.prompt(case, self.ladder[rung]))

    def _spared_share(self) -> np.ndarray:
        """What an answer at each rung takes over of a glance, in the mean over validation cases; largest cost = 1."""
        glance = self.look.glance
        if glance is None:
            return np.zeros(len(self.ladder))
        cases = self.stages.splits["val"][:SAMPLED]
        prompts = [[self.performer.prompt(c, b) for b in self.ladder] for c in cases]
        spared = [[glance.spared(c, p) for p in row] for c, row in zip(cases, prompts, strict=True)]
        return np.mean(spared, 0) / np.mean([self.performer.flops(row[-1], 1) for row in prompts])


def glance_keys(options: AllocatorOptions, performer: Performer) -> dict[str, Any]:
    """Keys of an allocator's configuration that ask for a glance; none where the recipe does not."""
    asked = {"look_state": options.look_state, "look_confidence": options.look_confidence}
    told = [budget is not None for budget in asked.values()]
    return {**asked, "state_dim": Glance.width(performer, *told)} if any(told) else {}


def fit_value(stages: Stages, performer: Performer, start: ValueAllocator, table: ScoreTable) -> ValueDecider:
    """Fit on a table, starting from the jointly trained allocator; a finished fit is read from the run's folder."""
    if (more := glance_keys(stages.run.allocator, performer)) and not start.config.state_dim:
        start = widened(start, **more)
    return ValueDecider(stages, performer, *fitted(stages, performer, start, table, Regression()))


def load_value(stages: Stages, performer: Performer) -> ValueDecider:
    """Read a finished fit from the run's folder."""
    return ValueDecider(stages, performer, *read_fit(stages, ValueAllocator), stages.rung_cost(performer))
