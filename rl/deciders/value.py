"""The form `value`: predicted scores from the cheapest look, minus price times cost."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.value import ValueAllocator
from models.performer import Performer
from rl.allocation.fitting import Regression, predict
from rl.deciders.fitted import fitted, read_fit
from rl.deciders.network import NetworkDecider
from rl.stages import Stages


class ValueDecider(NetworkDecider):
    """A fitted value allocator; `held_out` are predicted scores (N, rungs)."""

    form = "value"
    allocator: ValueAllocator

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


def fit_value(stages: Stages, performer: Performer, start: ValueAllocator, table: ScoreTable) -> ValueDecider:
    """Fit on a table, starting from the jointly trained allocator; a finished fit is read from the run's folder."""
    return ValueDecider(stages, performer, *fitted(stages, performer, start, table, Regression()))


def load_value(stages: Stages, performer: Performer) -> ValueDecider:
    """Read a finished fit from the run's folder."""
    return ValueDecider(stages, performer, *read_fit(stages, ValueAllocator))
