"""Expected reward of a policy over a score table: exact, and so is its gradient.

With a table nothing has to be drawn: sum_k pi(k | case, price) R(case, k, price) is differentiated as it stands.
"""

from __future__ import annotations

import numpy as np
import torch

from models.allocators.policy import PolicyAllocator
from rl.allocation.fitting import Aim, Inputs
from rl.allocation.objectives import Objective

GRID = 13
"""Prices of the range at which a fit is judged."""


def expected_reward(logits: torch.Tensor, reward: torch.Tensor, entropy: float = 0.0) -> torch.Tensor:
    """Mean over cases of the reward that a policy expects, with a bonus for its entropy.

    Args:
        logits: (B, rungs). reward: (B, rungs). entropy: reward for a nat of entropy.
    """
    logs = logits.log_softmax(-1)
    return (logs.exp() * (reward - entropy * logs)).sum(-1).mean()


class ExpectedReward(Aim[PolicyAllocator]):
    """The aim of a policy's fit: at prices that are drawn for every case, so that one network serves all.

    Args:
        objective: gives the rewards.
        prices: lowest and highest.
        entropy: reward for a nat of entropy; decay: its factor for each epoch.
    """

    def __init__(self, objective: Objective, prices: tuple[float, float], entropy: float = 0.0, decay: float = 1.0):
        self.objective, self.entropy, self.decay = objective, entropy, decay
        self.grid = np.unique(np.geomspace(*prices, GRID))

    def loss(self, allocator: PolicyAllocator, inputs: Inputs, scores: torch.Tensor, epoch: int) -> torch.Tensor:
        price = allocator.draw_prices(len(scores))
        reward = self.objective(scores, price[:, None])
        return -expected_reward(allocator(*inputs, price), reward, self.entropy * self.decay**epoch)

    def predict(self, allocator: PolicyAllocator, inputs: Inputs) -> np.ndarray:
        """Probabilities (B, prices of the grid, rungs)."""
        return allocator.sweep(*inputs, self.grid.tolist()).numpy()

    def held_out(self, predicted: np.ndarray, scores: np.ndarray) -> float:
        """Minus the expected reward, in the mean over cases and prices."""
        reward = np.stack([self.objective(scores, float(p)) for p in self.grid], 1)
        return -float((predicted * reward).sum(-1).mean())

    def rungs(self, predicted: np.ndarray, price: float) -> np.ndarray:
        """Most probable rungs (N,) at any price, from what `predict` gave at those of the grid."""
        at = np.interp(np.log(max(price, self.grid[0])), np.log(self.grid), np.arange(len(self.grid)))
        before, after = int(np.floor(at)), int(np.ceil(at))
        logs = np.log(np.maximum(predicted[:, [before, after]], 1e-30))
        return (logs[:, 0] + (at - before) * (logs[:, 1] - logs[:, 0])).argmax(-1)
