"""The allocator that predicts the performer's score at every rung of the ladder.

It acts by predicted score minus price times cost, so that one trained allocator serves every price.
"""

from __future__ import annotations

import torch

from models.allocators.network import LookNetwork
from models.modes import evaluating


class ValueAllocator(LookNetwork):
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
