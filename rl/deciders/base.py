"""What an allocator decided, whatever its form, and what came of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from envs.case import Case
from envs.score_table import ScoreTable
from rl.frontier import chosen


@dataclass(frozen=True)
class Decisions:
    """Budgets for N cases at one price, and the answers they bought.

    Args:
        price: lambda.
        rungs: (N,) rung of the ladder, the nearest one where the form is not bound to the ladder.
        score: (N,) in 0..1. visual: (N,) realised tokens. flops: (N,) of the answer.
        look: (N,) FLOPs of deciding, earlier looks included.
    """

    price: float
    rungs: np.ndarray
    score: np.ndarray
    visual: np.ndarray
    flops: np.ndarray
    look: np.ndarray

    @classmethod
    def from_table(cls, price: float, table: ScoreTable, rungs: np.ndarray, look: np.ndarray) -> Decisions:
        """Decisions among the columns of a table of N cases."""
        score, visual, flops = (chosen(v, rungs) for v in (table.score, table.visual, table.flops))
        return cls(price, rungs, score, visual, flops, look)

    @property
    def cost(self) -> np.ndarray:
        """FLOPs (N,) with those of deciding."""
        return self.flops + self.look


class Decider(ABC):
    """An allocator that is ready to decide about the cases of a run.

    Args:
        ladder: budgets in tokens.
    """

    form: str
    ladder: list[int]

    @abstractmethod
    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        """Rungs (N,) for any cases whose images the performer can see, and the FLOPs (N,) of choosing them."""

    @abstractmethod
    def decide(self, split: str, price: float) -> Decisions:
        """Decisions about the cases of `val` or `test`; those of `val` by fits that had not seen the patient."""

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

    def share_look(self, cases: Sequence[Case]) -> np.ndarray:
        """FLOPs (N,) that a static budget costs to be divided among the slides of each case."""
        return np.zeros(len(cases))

    def look_ms(self, cases: Sequence[Case], price: float) -> np.ndarray:
        """Milliseconds (N,) of deciding about each case by itself."""
        times = []
        for case in cases:
            start = time.perf_counter()
            self.choose([case], price)
            times.append(1000 * (time.perf_counter() - start))
        return np.array(times)
