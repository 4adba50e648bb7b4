"""Points of accuracy against cost, from score tables: budgets, allocator, random allocator, oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rewards.bootstrap import Bootstrap


@dataclass(frozen=True)
class Point:
    """One operating point on n cases.

    Args:
        accuracy, ci95: mean score and its 95 % bootstrap interval (resampling patients).
        tokens: mean realised visual tokens.
        flops: mean FLOPs of an answer, the allocator's look included; flops_stage1: of that look alone.
        latency_ms: mean wall time of an answer at batch size 1, on this machine.
        budget, price: what it was run at.
    """

    accuracy: float
    ci95: tuple[float, float]
    tokens: float
    flops: float
    flops_stage1: float
    latency_ms: float | None
    n: int
    budget: int | None = None
    price: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what does not apply is left out."""
        return {k: v for k, v in asdict(self).items() if v is not None or k == "latency_ms"}


def point(
    score: np.ndarray,
    tokens: np.ndarray,
    flops: np.ndarray,
    bootstrap: Bootstrap,
    stage1: float = 0.0,
    latency_ms: float | None = None,
    **where: Any,
) -> Point:
    """A point from per-case scores, tokens and FLOPs (all (N,))."""
    return Point(
        accuracy=float(score.mean()),
        ci95=bootstrap.interval(score),
        tokens=float(tokens.mean()),
        flops=float(flops.mean()) + stage1,
        flops_stage1=stage1,
        latency_ms=latency_ms,
        n=len(score),
        **where,
    )


def chosen(values: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Per-case values (N,) of a table (N, K) at the chosen rungs (N,)."""
    return np.take_along_axis(values, rungs[:, None], 1)[:, 0]


def mixed(values: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Expected per-case values (N,) when the chosen rungs are dealt out to the cases at random.

    This is the random allocator of equal mean budget, exactly: no draw is made.
    """
    share = np.bincount(rungs, minlength=values.shape[1]) / len(rungs)
    return values @ share


def oracle_rungs(score: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """The cheapest rung of the highest score of every case: (N, K) -> (N,)."""
    best = score >= score.max(1, keepdims=True) - 1e-9
    return np.where(best, flops, np.inf).argmin(1)


def pick_price(lost: Sequence[float], errors: Sequence[float], costs: Sequence[float], tolerance: float) -> int:
    """Index of the cheapest price that loses no more than the tolerance, or than its own standard error if larger.

    The one-standard-error rule (Breiman et al. 1984, section 3.4.3): on few validation cases the most accurate of many
    prices is so by chance, and dearer for nothing. If all lose more, the price that loses least.

    Args:
        lost: accuracy below the best of all, of each price. errors: standard error of each.
    """
    within = [i for i, (a, e) in enumerate(zip(lost, errors, strict=True)) if a <= max(tolerance, e)]
    if not within:
        return int(np.argmin(lost))
    return min(within, key=lambda i: costs[i])
