"""The allocator that predicts the performer's score at every rung of the ladder.

It acts by predicted score minus price times cost, so that one trained allocator serves every price.

The form `value`: predicted scores from the cheapest look, minus price times cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from frugalpath.allocator.base import NetworkAllocator, TrainedRun
from frugalpath.allocator.fitting import Regression, fitted, predict, read_fit
from frugalpath.allocator.network import AllocatorNetwork
from frugalpath.envs.case import Case
from frugalpath.models.modes import evaluating


class ValueNetwork(AllocatorNetwork):
    """Predicted score (as a logit) of every rung: look (B, K, sum(look), d), question (B, T) -> (B, rungs)."""

    def forward(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits (B, rungs) of the performer's score."""
        return self.read(look, question)

    @torch.no_grad()
    def choose(self, look: torch.Tensor, question: torch.Tensor, price: float, cost: torch.Tensor) -> torch.Tensor:
        """Rungs (B,) that maximise predicted score minus price times cost.

        Args:
            cost: (rungs,) or (B, rungs), the largest budget = 1.
        """
        with evaluating(self):
            value = self(look, question).sigmoid() - price * cost
        return value.argmax(-1)


class ValueAllocator(NetworkAllocator):
    """A fitted value allocator; `held_out` are predicted scores (N, rungs)."""

    form = "value"
    network: ValueNetwork

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        return {"val": self.held_out, "test": predict(self.network, *self._seen)}

    def values(self, cases: Sequence[Case]) -> np.ndarray:
        return predict(self.network, *self.look(cases))

    def predicted(self, split: str) -> np.ndarray:
        return self._values[split]

    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        return self.objective.best(predict(self.network, look, question), price)

    def held_out_rungs(self, price: float) -> np.ndarray:
        return self.objective.best(self.held_out, price)


def fit_value(trained: TrainedRun, start: ValueNetwork) -> ValueAllocator:
    """Fit on the validation cases' table, from the jointly trained network on; a finished fit is read."""
    return ValueAllocator(trained, *fitted(trained, start, Regression()))


def load_value(trained: TrainedRun) -> ValueAllocator:
    """Read a finished fit from the run's folder."""
    return ValueAllocator(trained, *read_fit(trained, ValueNetwork))
