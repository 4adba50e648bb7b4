"""What the forms share that are a small network over the cheapest look."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from envs.case import Case
from models.allocators.look import CheapLook
from models.allocators.network import LookNetwork
from models.performer import Performer
from rl.allocation.objectives import settle_price
from rl.deciders.base import Decider, Decisions
from rl.stages import Stages


class NetworkDecider(Decider):
    """A fitted network.

    Args:
        stages: the run. performer: its trained performer. allocator: fitted on the validation cases.
        held_out: what the fit's aim predicts of the validation cases, each by a fit that had not seen the patient.
    """

    def __init__(self, stages: Stages, performer: Performer, allocator: LookNetwork, held_out: np.ndarray):
        self.stages, self.performer, self.allocator, self.held_out = stages, performer, allocator, held_out
        self.ladder = stages.run.ladder
        self.look = CheapLook(performer, allocator.config)
        self.objective = stages.objective(performer)

    @abstractmethod
    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        """Rungs (N,) of cases by their looks and questions."""

    @abstractmethod
    def held_out_rungs(self, price: float) -> np.ndarray:
        """Rungs (N,) of the validation cases by fits that had not seen the patient."""

    @property
    def rung_cost(self) -> Sequence[float]:
        return self.objective.cost

    @cached_property
    def _seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.look(self.stages.splits["test"])

    @cached_property
    def settled(self) -> float | None:
        target = self.objective.target
        if target is None:
            return None
        largest = self.stages.table("grpo", self.performer, "val").at(self.ladder[-1:]).flops.mean()
        return settle_price(lambda price: float(self.decide("val", price).cost.mean() / largest), target)

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        return self.rungs(*self.look(cases), price), self._look_flops(cases)

    def decide(self, split: str, price: float) -> Decisions:
        table = self.stages.table("grpo", self.performer, split).at(self.ladder)
        rungs = self.held_out_rungs(price) if split == "val" else self.rungs(*self._seen, price)
        return Decisions.from_table(price, table, rungs, self._look_flops(self.stages.splits[split]))

    def _look_flops(self, cases: Sequence[Case]) -> np.ndarray:
        return np.array([self.allocator.flops(len(self.performer.sources(c))) for c in cases])
