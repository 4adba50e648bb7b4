"""Are the allocator's predictions true, and does it spend where that helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.bootstrap import Bootstrap

BINS = 10
"""Bins of a reliability curve; each has at least `PER_BIN` cases."""
PER_BIN = 10


def base_rates(score: np.ndarray, questions: Sequence[str], asked: Sequence[str]) -> np.ndarray:
    """Forecasts (M, K) for cases that ask `asked`: mean scores (N, K) by kind of question; of all for a new kind."""
    kinds = np.array(questions)
    means = {q: score[kinds == q].mean(0) for q in set(questions)}
    return np.stack([means.get(q, score.mean(0)) for q in asked])


def reliability(predicted: np.ndarray, score: np.ndarray, base: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """How well predictions (N,) forecast scores (N,), both in 0..1.

    Args:
        base: (N,) what one would forecast without looking.

    Returns:
        `predicted`, `observed`: means. `ece`: expected calibration error over bins of equal mass (Nguyen and O'Connor
        2015); it is above 0 by chance too. `brier`: mean squared error, `brier_skill`: 1 - brier / brier of `base`,
        None where that is 0. `curve`: `{n, predicted, observed}` of each bin. Equal predictions share a bin.
    """
    bins = max(1, min(bins, len(score) // PER_BIN))
    edges = np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1])
    members = np.searchsorted(edges, predicted, "right")
    curve = []
    for b in np.unique(members):
        rows = members == b
        means = {"predicted": float(predicted[rows].mean()), "observed": float(score[rows].mean())}
        curve.append({"n": int(rows.sum()), **means})
    brier, plain = (float(((p - score) ** 2).mean()) for p in (predicted, base))
    return {
        "predicted": float(predicted.mean()),
        "observed": float(score.mean()),
        "ece": sum(c["n"] * abs(c["predicted"] - c["observed"]) for c in curve) / len(score),
        "brier": brier,
        "brier_skill": 1 - brier / plain if plain > 0 else None,
        "curve": curve,
    }


def calibration(predicted: np.ndarray, score: np.ndarray, base: np.ndarray, budgets: Sequence[int]) -> dict[str, Any]:
    """`reliability` of predicted scores (N, K) at every budget, and of all of them together.

    Args:
        base: (N, K), see `base_rates`.
    """
    columns = zip(budgets, predicted.T, score.T, base.T, strict=True)
    return {
        "by_budget": {str(b): reliability(p, s, r) for b, p, s, r in columns},
        "all": reliability(predicted.ravel(), score.ravel(), base.ravel()),
    }


def spend(
    score: np.ndarray, tokens: np.ndarray, rungs: np.ndarray, budgets: Sequence[int], bootstrap: Bootstrap
) -> dict:
    """Is more spent where it helps.

    A case's gain is its score at the largest budget minus that at the smallest.

    Args:
        score: (N, K). tokens, rungs: (N,) what was spent.

    Returns:
        `by_budget`: `n` and mean `gain` `{value, ci95}` of the cases that got it. `rank_correlation` of spend with
        gain (Spearman) as `{value, ci95}`, None where either is the same for all cases.
    """
    gain = score[:, -1] - score[:, 0]
    by_budget = {}
    for k, budget in enumerate(budgets):
        rows = rungs == k
        if rows.any():
            low, high = bootstrap.interval(np.where(rows, gain, np.nan))
            by_budget[str(budget)] = {
                "n": int(rows.sum()),
                "gain": {"value": float(gain[rows].mean()), "ci95": [low, high]},
            }
    return {"by_budget": by_budget, "rank_correlation": rank_correlation(tokens, gain, bootstrap)}


def rank_correlation(x: np.ndarray, y: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Spearman's rank correlation of x and y (N,) as `{value, ci95}`; the cases are ranked anew in each resample."""
    levels = [np.unique(v, return_inverse=True)[1] for v in (x, y)]
    value = _weighted(levels, np.ones(len(x)))
    if np.isnan(value):
        return {"value": None, "ci95": None}
    drawn = [_weighted(levels, weight[bootstrap.group]) for weight in bootstrap.weight.astype(float)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"value": value, "ci95": [float(low), float(high)]}


def _weighted(levels: list[np.ndarray], weight: np.ndarray) -> float:
    """Pearson's correlation of the mid-ranks of two columns of levels, each case counted `weight` times."""
    ranks = []
    for level in levels:
        count = np.bincount(level, weights=weight)
        middle = (np.cumsum(count) - count / 2)[level]
        ranks.append(middle - (weight @ middle) / weight.sum())
    x, y = ranks
    spread = (weight @ x**2) * (weight @ y**2)
    return float((weight * x) @ y / np.sqrt(spread)) if spread > 1e-9 else float("nan")
