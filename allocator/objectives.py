"""What an allocator is to maximise, over the rungs of a run's ladder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from frugalpath.models.performer import Performer
from frugalpath.recipe.data import RunData
from frugalpath.rewards.cost import birr_cap, worth

TAGS = 5
"""Tokens that are written around an answer."""


@dataclass(frozen=True)
class Objective:
    """A preset over a ladder.

    Args:
        name: see `frugalpath.rewards.cost`.
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
        return worth(self.name, score, tokens, cost, price, self.ladder[-1])

    def best(self, score: Any, price: float) -> Any:
        """Rungs (N,) of the highest reward, of (predicted) scores (N, rungs)."""
        return self(score, price).argmax(-1)

    @property
    def below_cap(self) -> int | None:
        """The largest rung that the published threshold does not punish, where that is the objective."""
        allowed = [k for k, budget in enumerate(self.ladder) if budget < birr_cap(self.ladder[-1])]
        return allowed[-1] if self.name == "birr" and allowed else None


def rung_cost(data: RunData, performer: Performer) -> list[float]:
    """FLOPs of an answer at every rung, the largest = 1, in the mean over training questions."""
    ladder, train = data.run.ladder, data.splits["train"]
    sample = train[:: max(1, len(train) // 100)]
    tokenizer = performer.processor.tokenizer
    written = [len(tokenizer(c.answer)["input_ids"]) + TAGS for c in sample]
    flops = []
    for budget in ladder:
        prompts = [performer.prompt(c, budget) for c in sample]
        flops.append(sum(performer.flops(p, w) for p, w in zip(prompts, written, strict=True)))
    return [f / flops[-1] for f in flops]


def objective_of(data: RunData, performer: Performer) -> Objective:
    """The recipe's, at the cost of the performer's answers."""
    options, ladder = data.run.allocator, data.run.ladder
    return Objective(options.objective, tuple(ladder), tuple(rung_cost(data, performer)), options.target)


def settle_price(cost_at: Callable[[float], float], target: float, highest: float = 16.0, rounds: int = 40) -> float:
    """The price at which the mean cost, which falls with the price, comes nearest to a target: by bisection.

    This is what dual ascent on the constraint comes to, where the cost at every price is known.

    Args:
        cost_at: mean cost at a price. highest: price that is tried at most; what is dearer is never chosen then.

    Returns:
        0 where the target is met for nothing.
    """
    low, high, tried = 0.0, highest, {}
    for price in (low, high):
        tried[price] = cost_at(price)
    if tried[low] <= target:
        return low
    for _ in range(rounds):
        price = (low + high) / 2
        tried[price] = cost_at(price)
        low, high = (price, high) if tried[price] > target else (low, price)
    # Cases are few, so that the cost has steps: the nearest of both sides.
    return min(tried, key=lambda p: abs(tried[p] - target))
