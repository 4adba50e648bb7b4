"""The allocator as a policy over the rungs of the ladder, given the price of cost.

One network serves every price: it is trained with prices drawn from a range, and reads the logarithm of the price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.allocators.network import AllocatorConfig, LookNetwork
from models.modes import evaluating

BUMPS = 7
"""Over the logarithm of the price; they and the price itself tell the network where in the range it is."""
GAIN = 10.0
"""Logits for a unit of what the network writes, so that weights as small as those of a network of scores tell rewards
apart that differ by hundredths."""


class PolicyConfig(AllocatorConfig):
    """Configuration of a policy.

    Args:
        prices: lowest and highest price that it is trained for; prices beyond act as these.
        kwargs: of `AllocatorConfig`.
    """

    model_type = "frugalpath_policy_allocator"

    def __init__(self, prices: Sequence[float] = (0.003, 1.0), **kwargs: Any):
        self.prices = list(prices)
        super().__init__(**kwargs)


class PolicyAllocator(LookNetwork):
    """Policy over rungs: look (B, K, sum(look), d), question (B, T), price (B,) -> logits (B, rungs)."""

    config_class: type[AllocatorConfig] = PolicyConfig

    def __init__(self, config: PolicyConfig):
        super().__init__(config, extra=BUMPS + 1)
        # The price also shifts all logits by itself, past dropout: what one case gets at a price, all get in part.
        self.shift = nn.Linear(BUMPS + 1, len(config.ladder))
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def forward(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor) -> torch.Tensor:
        """Logits (B, rungs) at a price for each case (B,)."""
        where = self._where(price)
        return GAIN * (self.read(look, question, where) + self.shift(where))

    def _where(self, price: torch.Tensor) -> torch.Tensor:
        """Bumps over the logarithm of the price, along the range, and the price as a share of the highest, (B, 8)."""
        low, high = (math.log(p) for p in self.config.prices)
        at = (price.clamp(*self.config.prices).log() - low) / max(high - low, 1e-9) * (BUMPS - 1)
        centres = torch.arange(BUMPS, dtype=at.dtype, device=at.device)
        bumps = torch.exp(-((at[:, None] - centres) ** 2) / 2)
        share = price.clamp(*self.config.prices)[:, None] / self.config.prices[1]
        return torch.cat([bumps, share], 1).to(self.mean.dtype)

    def draw_prices(self, count: int) -> torch.Tensor:
        """Prices (count,) of the range, log-uniformly."""
        low, high = (math.log(p) for p in self.config.prices)
        return (low + (high - low) * torch.rand(count)).exp()

    @torch.no_grad()
    def probabilities(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor | float) -> torch.Tensor:
        """Probabilities (B, rungs) without dropout, at one price or at one for each case (B,)."""
        with evaluating(self):
            logits = self(look, question, torch.as_tensor(price, dtype=torch.float32).expand(len(look)))
        return logits.softmax(-1)

    @torch.no_grad()
    def sweep(self, look: torch.Tensor, question: torch.Tensor, prices: Sequence[float]) -> torch.Tensor:
        """Probabilities (B, prices, rungs) without dropout; the look is read once."""
        with evaluating(self):
            gathered = self.gather(look, question)
            where = self._where(torch.tensor(prices, dtype=torch.float32))
            read = [self.head(torch.cat([gathered, at.expand(len(look), -1)], 1)) + self.shift(at) for at in where]
        return (GAIN * torch.stack(read, 1)).softmax(-1)

    def choose(self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor | float) -> torch.Tensor:
        """The most probable rung (B,) of each case."""
        return self.probabilities(look, question, price).argmax(-1)

    def sample(
        self, look: torch.Tensor, question: torch.Tensor, price: torch.Tensor | float, count: int, explore: float = 0.0
    ) -> torch.Tensor:
        """Rungs (B, count), drawn independently; a share `explore` of the draws is uniform."""
        return torch.multinomial(explored(self.probabilities(look, question, price), explore), count, replacement=True)


def explored(policy: torch.Tensor, explore: float) -> torch.Tensor:
    """Probabilities (B, rungs) of a policy with a share of uniform draws."""
    return policy * (1 - explore) + explore / policy.shape[-1]
