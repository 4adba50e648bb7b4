"""The form `policy`: the most probable budget at a price, of a policy fitted by the exact gradient."""

from __future__ import annotations

import numpy as np
import torch

from envs.score_table import ScoreTable
from models.allocators.policy import PolicyAllocator
from models.performer import Performer
from rl.allocation.exact import ExpectedReward
from rl.deciders.fitted import fitted, read_fit
from rl.deciders.network import NetworkDecider
from rl.stages import Stages


class PolicyDecider(NetworkDecider):
    """A fitted policy; `held_out` are probabilities (N, prices, rungs) at the prices of the aim's grid."""

    form = "policy"
    allocator: PolicyAllocator

    def __init__(
        self,
        stages: Stages,
        performer: Performer,
        allocator: PolicyAllocator,
        held_out: np.ndarray,
        aim: ExpectedReward,
    ):
        super().__init__(stages, performer, allocator, held_out)
        self.aim = aim

    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        return self.allocator.choose(look, question, price).numpy()

    def held_out_rungs(self, price: float) -> np.ndarray:
        return self.aim.rungs(self.held_out, price)


def fit_policy(stages: Stages, performer: Performer, start: PolicyAllocator, table: ScoreTable) -> PolicyDecider:
    """Fit on a table, starting from the jointly trained policy; a finished fit is read from the run's folder."""
    aim = _aim(stages, performer)
    return PolicyDecider(stages, performer, *fitted(stages, performer, start, table, aim), aim)


def load_policy(stages: Stages, performer: Performer) -> PolicyDecider:
    """Read a finished fit from the run's folder."""
    return PolicyDecider(stages, performer, *read_fit(stages, PolicyAllocator), _aim(stages, performer))


def _aim(stages: Stages, performer: Performer) -> ExpectedReward:
    options = stages.run.allocator
    low, high = options.price_range
    return ExpectedReward(stages.objective(performer), (low, high), options.entropy, options.entropy_decay)
