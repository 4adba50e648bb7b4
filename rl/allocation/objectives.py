"""What an allocator is to maximise, over the rungs of a run's ladder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rewards.cost import dual_price
from rewards.objectives import birr_cap, worth


@dataclass(frozen=True)
class Objective:
    """A preset over a ladder.

    Args:
        name: see `rewards.objectives`.
        ladder: budgets in tokens, ascending. cost: of each, the largest budget = 1.
        target: mean cost that `dual` aims at, in the same unit.
    """

    name: str
    ladder: tuple[int, ...]
    cost: tuple[float, ...]
    target: float | None = None

    def __call__(self, score: Any, price: Any, rungs: torch.Tensor | None = None) -> Any:
        """Rewards of scores (N, rungs), or of scores (N, M) of some rungs (N, M), at a price or at prices (N, 1)."""
        tokens, cost = np.array(self.ladder, dtype=float), np.array(self.cost)
        if rungs is not None:
            tokens, cost = tokens[rungs.cpu().numpy()], cost[rungs.cpu().numpy()]
        return worth(self.name, score, tokens, cost, price, self.ladder[-1], self.ladder[0])

    def best(self, score: Any, price: float) -> Any:
        """Rungs (N,) of the highest reward, of (predicted) scores (N, rungs)."""
        return self(score, price).argmax(-1)

    @property
    def below_cap(self) -> int | None:
        """The largest rung that the published threshold does not punish, where that is the objective."""
        allowed = [k for k, budget in enumerate(self.ladder) if budget < birr_cap(self.ladder[-1])]
        return allowed[-1] if self.name == "birr" and allowed else None


def settle_price(cost_at: Callable[[float], float], target: float, price: float, rounds: int = 200) -> float:
    """The price at which the mean cost comes nearest to a target, by dual ascent with steps that grow smaller.

    Args:
        cost_at: mean cost at a price. price: the first.

    Returns:
        A price of 0 or more; 0 where the target is not reached for nothing.
    """
    tried = {}
    for at in range(rounds):
        cost = tried[price] = cost_at(price)
        price = dual_price(price, [cost], target, 0.3 / (1 + at) ** 0.5)
    return min(tried, key=lambda p: abs(tried[p] - target))
