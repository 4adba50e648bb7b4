"""What every form of the allocator has, and what it decided; what those share that are a small network."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from frugalpath.allocator.network import AllocatorInputs, AllocatorNetwork
from frugalpath.allocator.objectives import Objective, settle_price
from frugalpath.allocator.score_table import ScoreTable, chosen
from frugalpath.envs.case import Case
from frugalpath.models.performer import Performer
from frugalpath.recipe.data import RunData


@dataclass(frozen=True)
class Decisions:
    """Budgets for N cases at one price, and the answers they bought.

    Args:
        price: lambda.
        rungs: (N,) rung of the ladder, the nearest one where the form is not bound to the ladder.
        score: (N,) in 0..1. visual: (N,) realised tokens. flops: (N,) of the answer.
        look: (N,) FLOPs of deciding, other looks included.
        look_tokens: (N,) visual tokens that a language model read to decide; None where it read none.
        details: what is kept of each case where the answers are not those of a table's rungs.
    """

    price: float
    rungs: np.ndarray
    score: np.ndarray
    visual: np.ndarray
    flops: np.ndarray
    look: np.ndarray
    look_tokens: np.ndarray | None = None
    details: list[dict[str, Any]] | None = None

    @classmethod
    def from_table(cls, price: float, table: ScoreTable, rungs: np.ndarray, look: np.ndarray) -> Decisions:
        """Decisions among the columns of a table of N cases."""
        score, visual, flops = (chosen(v, rungs) for v in (table.score, table.visual, table.flops))
        return cls(price, rungs, score, visual, flops, look)

    @property
    def cost(self) -> np.ndarray:
        """FLOPs (N,) with those of deciding."""
        return self.flops + self.look


@dataclass(frozen=True)
class Answered:
    """The answer to one case in two stages: a look that chooses the budget, and the answer at that budget.

    Args:
        text: completion.
        budget: asked for, in tokens.
        looks: budgets that were tried, one after another; the answer is that of `budget`, which is one of them.
        visual, prompt, generated: realised visual tokens, text tokens of the prompt and tokens written.
        look_flops, flops: of the look, other budgets tried included, and of the answer.
        look_ms, ms: wall milliseconds of both, at batch size 1.
        confidence: see `frugalpath.models.performer.Answer`.
    """

    text: str
    budget: int
    looks: tuple[int, ...]
    visual: int
    prompt: int
    generated: int
    look_flops: float
    flops: float
    look_ms: float
    ms: float
    confidence: float


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What an allocator is fitted on, and decides about: a run whose performer is trained.

    Args:
        data: its cases.
        performer: the trained performer.
        objective: what the allocator maximises.
        tables: the performer's answers to the cases of `val` and `test` at every budget; empty for new cases.
        key: what the joint stage depended on, see `frugalpath.recipe.cache_key`.
    """

    data: RunData
    performer: Performer
    objective: Objective
    tables: Mapping[str, ScoreTable] = field(default_factory=dict)
    key: Mapping[str, Any] = field(default_factory=dict)


class Allocator(ABC):
    """An allocator that is ready to decide about the cases of a run.

    Args:
        trained: the run.
    """

    form: str
    folder = "allocator"
    """Of the run's, where it is kept."""

    def __init__(self, trained: TrainedRun):
        self.trained, self.data, self.performer = trained, trained.data, trained.performer
        self.ladder: list[int] = trained.data.run.ladder
        self.objective = trained.objective

    def prices(self, asked: Sequence[float]) -> list[float]:
        """Those of the prices asked for at which it decides differently."""
        return list(asked)

    def warnings(self) -> list[str]:
        """What is wrong with it, and the remedy."""
        return []

    @abstractmethod
    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        """Rungs (N,) for any cases whose images the performer can see, and the FLOPs (N,) of choosing them."""

    @abstractmethod
    def decide(self, split: str, price: float) -> Decisions:
        """Decisions about the cases of `val` or `test`; those of `val` by fits that had not seen the patient."""

    def decide_on(self, cases: Sequence[Case], price: float, table: ScoreTable) -> Decisions:
        """Decisions about other cases, whose images the performer can see.

        Args:
            table: of these cases, the ladder's columns.
        """
        return Decisions.from_table(price, table, *self.choose(cases, price))

    @property
    def settled(self) -> float | None:
        """The price that meets the target cost on validation cases, where the objective is `dual`."""
        return None

    def predicted(self, split: str) -> np.ndarray | None:
        """Predicted scores (N, rungs) of a split, where the form predicts any; `val` out of fold."""
        return None

    def values(self, cases: Sequence[Case]) -> np.ndarray | None:
        """Predicted scores (N, rungs) of any cases, where the form predicts any."""
        return None

    def answer(self, case: Case, price: float) -> Answered:
        """Look, choose a budget at a price and answer, one case alone."""
        start = time.perf_counter()
        rungs, flops = self.choose([case], price)
        return self._answered(case, self.ladder[rungs[0]], float(flops[0]), start)

    def answer_at(self, case: Case, budget: int) -> Answered:
        """Answer one case alone at a budget that nothing chooses."""
        return self._answered(case, budget, 0.0, time.perf_counter())

    def _answered(self, case: Case, budget: int, look_flops: float, start: float) -> Answered:
        look_ms = 1000 * (time.perf_counter() - start)
        (found,) = self.performer.answer([case], [budget], self.data.max_new_tokens, 1)
        return Answered(
            text=found.text,
            budget=budget,
            looks=(budget,),
            visual=found.visual,
            prompt=found.prompt,
            generated=found.generated,
            look_flops=look_flops,
            flops=found.flops,
            look_ms=look_ms,
            ms=1000 * found.seconds,
            confidence=found.confidence,
        )

    def look_ms(self, cases: Sequence[Case], price: float) -> np.ndarray:
        """Milliseconds (N,) of deciding about each case by itself."""
        times = []
        for case in cases:
            start = time.perf_counter()
            self.choose([case], price)
            times.append(1000 * (time.perf_counter() - start))
        return np.array(times)


class NetworkAllocator(Allocator):
    """A fitted network.

    Args:
        trained: the run. network: fitted on its validation cases.
        held_out: what the fit's aim predicts of the validation cases, each by a fit that had not seen the patient.
    """

    def __init__(self, trained: TrainedRun, network: AllocatorNetwork, held_out: np.ndarray):
        super().__init__(trained)
        self.network, self.held_out = network, held_out
        self.look = AllocatorInputs(trained.performer, network.config)

    @abstractmethod
    def rungs(self, look: torch.Tensor, question: torch.Tensor, price: float) -> np.ndarray:
        """Rungs (N,) of cases by their looks and questions."""

    @abstractmethod
    def held_out_rungs(self, price: float) -> np.ndarray:
        """Rungs (N,) of the validation cases by fits that had not seen the patient."""

    @cached_property
    def _seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.look(self.data.splits["test"])

    @cached_property
    def settled(self) -> float | None:
        target = self.objective.target
        if target is None:
            return None
        largest = self.trained.tables["val"].at(self.ladder[-1:]).flops.mean()
        return settle_price(lambda price: float(self.decide("val", price).cost.mean() / largest), target)

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        return self.rungs(*self.look(cases), price), self._look_flops(cases)

    def decide(self, split: str, price: float) -> Decisions:
        table = self.trained.tables[split].at(self.ladder)
        rungs = self.held_out_rungs(price) if split == "val" else self.rungs(*self._seen, price)
        return Decisions.from_table(price, table, rungs, self._look_flops(self.data.splits[split]))

    def _look_flops(self, cases: Sequence[Case]) -> np.ndarray:
        return np.array([self.network.flops(len(self.performer.sources(c))) for c in cases])
