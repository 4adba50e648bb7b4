"""The allocator as a policy over the rungs of the ladder, given the price of cost.

One network serves every price: it is trained with prices drawn from a range, and reads the logarithm of the price.

Expected reward of a policy over a score table: exact, and so is its gradient.

With a table nothing has to be drawn: sum_k pi(k | case, price) R(case, k, price) is differentiated as it stands.

The form `policy`: the most probable budget at a price, of a policy fitted by the exact gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from frugalpath.allocator.base import NetworkAllocator, TrainedRun
from frugalpath.allocator.fitting import Aim, Inputs, fitted, read_fit
from frugalpath.allocator.network import AllocatorConfig, AllocatorNetwork
from frugalpath.allocator.objectives import Objective
from frugalpath.models.modes import evaluating

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


class PolicyNetwork(AllocatorNetwork):
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


GRID = 13
"""Prices of the range at which a fit is judged."""


def expected_reward(logits: torch.Tensor, reward: torch.Tensor, entropy: float = 0.0) -> torch.Tensor:
    """Mean over cases of the reward that a policy expects, with a bonus for its entropy.

    Args:
        logits: (B, rungs). reward: (B, rungs). entropy: reward for a nat of entropy.
    """
    logs = logits.log_softmax(-1)
    return (logs.exp() * (reward - entropy * logs)).sum(-1).mean()


class ExpectedReward(Aim[PolicyNetwork]):
    """The aim of a policy's fit: at prices that are drawn for every case, so that one network serves all.

    Args:
        objective: gives the rewards.
        prices: lowest and highest.
        entropy: reward for a nat of entropy; decay: its factor for each epoch.
    """

    def __init__(self, objective: Objective, prices: tuple[float, float], entropy: float = 0.0, decay: float = 1.0):
        self.objective, self.entropy, self.decay = objective, entropy, decay
        self.grid = np.unique(np.geomspace(*prices, GRID))

    def loss(self, allocator: PolicyNetwork, inputs: Inputs, scores: torch.Tensor, epoch: int) -> torch.Tensor:
        price = allocator.draw_prices(len(scores))
        reward = self.objective(scores, price[:, None])
        return -expected_reward(allocator(*inputs, price), reward, self.entropy * self.decay**epoch)

    def predict(self, allocator: PolicyNetwork, inputs: Inputs) -> np.ndarray:
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


class PolicyAllocator(NetworkAllocator):
    """A fitted policy; `held_out` are probabilities (N, prices, rungs) at the prices of the aim's grid."""

    form = "policy"
    network: PolicyNetwork

    def __init__(self, trained: TrainedRun, network: PolicyNetwork, held_out: np.ndarray, aim: ExpectedReward):
        super().__init__(trained, network, held_out)
        self.aim = aim

    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        return self.network.choose(look, question, price).numpy()

    def held_out_rungs(self, price: float) -> np.ndarray:
        return self.aim.rungs(self.held_out, price)


def fit_policy(trained: TrainedRun, start: PolicyNetwork) -> PolicyAllocator:
    """Fit on the validation cases' table, from the jointly trained network on; a finished fit is read."""
    aim = _aim(trained)
    return PolicyAllocator(trained, *fitted(trained, start, aim), aim)


def load_policy(trained: TrainedRun) -> PolicyAllocator:
    """Read a finished fit from the run's folder."""
    return PolicyAllocator(trained, *read_fit(trained, PolicyNetwork), _aim(trained))


def _aim(trained: TrainedRun) -> ExpectedReward:
    options = trained.data.run.allocator
    low, high = options.price_range
    return ExpectedReward(trained.objective, (low, high), options.entropy, options.entropy_decay)
