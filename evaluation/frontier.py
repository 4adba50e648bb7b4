"""Operating points of accuracy against cost, from score tables: budgets, allocator, random allocator, oracle.

Compares an adaptive frontier with a static one: area between them, cost at equal accuracy, accuracy at equal cost.

A frontier is the best accuracy that a mean cost buys, in one of two forms. `step`: the best point that is no dearer,
as one runs a single setting for all cases. `mixed`: two settings may also be dealt out to the cases at random, which
gives any point on the line between theirs, so that the frontier is the upper concave hull of the points. The second is
the honest rival: it asks nothing of the cases.

Intervals resample patients, with the same draws on both sides. `areas` chooses the frontier anew in each resample. To
choose the best of noisy points is optimistic, for both sides, and more so for the one with more points: thirteen
random mixtures of five budgets on 1,000 cases lie above their hull with an interval above 0 in two of three data sets.
`area_of_chosen` takes points that were chosen on other cases, which mends it, and is the figure to go by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from frugalpath.bootstrap import Bootstrap


@dataclass(frozen=True)
class Point:
    """One operating point on n cases.

    Args:
        accuracy, ci95: mean score and its 95 % bootstrap interval (resampling patients).
        tokens: mean realised visual tokens.
        flops: mean FLOPs per answer, including the allocator's probe; flops_stage1: FLOPs of the probe alone.
        latency_ms: mean wall time of an answer at batch size 1, on this machine.
        budget, price: setting of the point.
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
        """Convert to a JSON mapping, without fields that do not apply."""
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
    """Make a point from per-case scores, tokens and FLOPs (all (N,))."""
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


def mixed(values: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Expected per-case values (N,) when the chosen rungs are assigned to cases at random.

    This is the exact expectation of the random allocator of equal mean budget; nothing is sampled.
    """
    share = np.bincount(rungs, minlength=values.shape[1]) / len(rungs)
    return values @ share


def oracle_rungs(score: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """The cheapest rung of the highest score of every case: (N, K) -> (N,)."""
    best = score >= score.max(1, keepdims=True) - 1e-9
    return np.where(best, flops, np.inf).argmin(1)


def pick_price(lost: Sequence[float], errors: Sequence[float], costs: Sequence[float], tolerance: float) -> int:
    """Index of the cheapest price that loses at most the tolerance or its own standard error, whichever is larger.

    The one-standard-error rule (Breiman et al. 1984, section 3.4.3): on few validation cases the most accurate of many
    prices is so by chance, and more expensive for nothing. If all lose more, the price that loses least.

    Args:
        lost: loss in accuracy against the best, for each price.
        errors: standard error of each loss.
    """
    within = [i for i, (a, e) in enumerate(zip(lost, errors, strict=True)) if a <= max(tolerance, e)]
    if not within:
        return int(np.argmin(lost))
    return min(within, key=lambda i: costs[i])


EQUAL = 1e-12
"""Accuracies that differ by less count as equal; sums of the same scores differ by rounding."""


@dataclass(frozen=True)
class Paid:
    """Score and cost of P settings on N cases.

    Args:
        score: (N, P).
        cost: (N, P), total cost in any one unit.
    """

    score: np.ndarray
    cost: np.ndarray

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean cost and score (P,)."""
        return self.cost.mean(0), self.score.mean(0)

    def resampled(self, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
        """Mean cost and score (R, P) of every resample."""
        cost, score = (np.stack([bootstrap.means(v) for v in part.T], 1) for part in (self.cost, self.score))
        return cost, score


@dataclass(frozen=True)
class Frontier:
    """Accuracy as a function of cost: NaN below the cheapest point, constant above the most expensive.

    Args:
        cost, accuracy: (M,) by ascending cost.
        mixed: linear between the points; else steps.
    """

    cost: np.ndarray
    accuracy: np.ndarray
    mixed: bool

    @classmethod
    def of(cls, cost: np.ndarray, accuracy: np.ndarray, mixed: bool) -> Frontier:
        """The frontier of points (P,) in any order."""
        keep = hull(cost, accuracy) if mixed else pareto(cost, accuracy)
        return cls(cost[keep], accuracy[keep], mixed)

    def at(self, cost: np.ndarray | float) -> np.ndarray:
        """Accuracy at some costs."""
        if self.mixed:
            return np.interp(cost, self.cost, self.accuracy, left=np.nan)
        at = np.searchsorted(self.cost, cost, "right") - 1
        return np.where(at < 0, np.nan, self.accuracy[np.maximum(at, 0)])

    def mean(self, low: float, high: float, log: bool = False) -> float:
        """Mean accuracy over the costs from `low` to `high`, or over their logarithms; exact. NaN if undefined."""
        if not low < high or low < self.cost[0] * (1 - EQUAL):
            return float("nan")
        x = np.concatenate([[low], self.cost[(self.cost > low) & (self.cost < high)], [high]])
        width = np.diff(np.log(x) if log else x)
        left = self.at(np.maximum(x[:-1], self.cost[0]))
        if not self.mixed:
            return float(left @ width / width.sum())
        right = self.at(x[1:])
        if not log:
            return float((left + right) @ width / 2 / width.sum())
        # The integral of a + b c over log c is a log c + b c.
        # Two prices may cost the same in a resample; the piece between them has no width and adds nothing.
        wide = width > 0
        slope = np.divide(right - left, np.diff(x), out=np.zeros_like(left), where=wide)
        start = left - slope * x[:-1]
        return float((start @ width + slope @ np.diff(x)) / width.sum())

    def cost_of(self, accuracy: float) -> float:
        """Least cost of an accuracy on a rising frontier; infinite if it is not reached."""
        if accuracy > self.accuracy[-1] + EQUAL:
            return float("inf")
        if self.mixed:
            return float(np.interp(accuracy, self.accuracy, self.cost))
        return float(self.cost[np.searchsorted(self.accuracy, accuracy - EQUAL)])


def pareto(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of the Pareto-optimal points (P,), by ascending cost; of equal points the first."""
    kept: list[int] = []
    for i in np.lexsort((-accuracy, cost)):
        if not kept or accuracy[i] > accuracy[kept[-1]]:
            kept.append(int(i))
    return np.array(kept)


def hull(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Indices of the corners of the upper concave hull up to the most accurate point, by ascending cost."""
    kept: list[int] = []
    for c in pareto(cost, accuracy):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            # b lies on or below the line from a to c.
            if (accuracy[b] - accuracy[a]) * (cost[c] - cost[a]) > (accuracy[c] - accuracy[a]) * (cost[b] - cost[a]):
                break
            kept.pop()
        kept.append(int(c))
    return np.array(kept)


def hypervolume(cost: np.ndarray, accuracy: np.ndarray, largest: float) -> float:
    """Area under the step frontier of points (P,), cost from 0 to `largest` scaled to 0..1; 0 below the cheapest."""
    front = Frontier.of(cost, accuracy, mixed=False)
    low = float(front.cost[0])
    return front.mean(low, largest) * (1 - low / largest) if low < largest else 0.0


def common_range(adaptive: np.ndarray, static: np.ndarray) -> tuple[float, float]:
    """Costs over which two sets of points (P,) and (K,) are compared: from the cheapest that both have to the largest
    static one. A more expensive allocator has nothing to be compared with."""
    return float(max(adaptive.min(), static.min())), float(static.max())


def areas(adaptive: Paid, static: Paid, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean difference of the adaptive and the static frontier over their common range, and hypervolumes.

    Returns:
        `range`: ends of the range as shares of the largest static cost. `mixed`, `step`: form of both frontiers, each
        `{linear, log}`, the mean over cost and over its logarithm. `hypervolume`: `{adaptive, static, difference}`.
        Figures are `{value, ci95}`, None where there is no common range.
    """
    (cost, score), (fixed_cost, fixed_score) = adaptive.means(), static.means()
    low, high = common_range(cost, fixed_cost)
    draws = zip(*adaptive.resampled(bootstrap), *static.resampled(bootstrap), strict=True)
    first = _compared(cost, score, fixed_cost, fixed_score)
    drawn = np.array([_compared(*each) for each in draws])
    found = [_figure(value, column) for value, column in zip(first, drawn.T, strict=True)]
    return {
        "range": [low / high, 1.0] if low < high else None,
        "mixed": {"linear": found[0], "log": found[1]},
        "step": {"linear": found[2], "log": found[3]},
        "hypervolume": {"adaptive": found[4], "static": found[5], "difference": found[6]},
    }


def _compared(cost: np.ndarray, score: np.ndarray, fixed_cost: np.ndarray, fixed_score: np.ndarray) -> list[float]:
    """Areas between the frontiers (mixed linear, mixed log, step linear, step log) and the hypervolumes."""
    low, high = common_range(cost, fixed_cost)
    out = []
    for mixed in (True, False):
        own, other = Frontier.of(cost, score, mixed), Frontier.of(fixed_cost, fixed_score, mixed)
        out += [own.mean(low, high, log) - other.mean(low, high, log) for log in (False, True)]
    volumes = [hypervolume(c, s, high) for c, s in ((cost, score), (fixed_cost, fixed_score))]
    return [*out, *volumes, volumes[0] - volumes[1]]


def area_of_chosen(
    adaptive: Paid, static: Paid, kept: tuple[np.ndarray, np.ndarray], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Like `mixed` of `areas`, between lines through points chosen in advance.

    Args:
        kept: which settings of either side, such as the corners of their hulls on validation cases.
    """

    def heights(cost: np.ndarray, score: np.ndarray, fixed_cost: np.ndarray, fixed_score: np.ndarray) -> list[float]:
        sides = []
        for c, s, keep in ((cost, score, kept[0]), (fixed_cost, fixed_score, kept[1])):
            order = keep[np.argsort(c[keep], kind="stable")]
            sides.append(Frontier(c[order], s[order], mixed=True))
        low, high = max(side.cost[0] for side in sides), fixed_cost.max()
        return [sides[0].mean(low, high, log) - sides[1].mean(low, high, log) for log in (False, True)]

    draws = zip(*adaptive.resampled(bootstrap), *static.resampled(bootstrap), strict=True)
    drawn = np.array([heights(*each) for each in draws]).T
    first = heights(*adaptive.means(), *static.means())
    return {name: _figure(v, column) for name, v, column in zip(("linear", "log"), first, drawn, strict=True)}


def at_operating_point(
    own: Paid, static: Paid, budgets: list[int], bootstrap: Bootstrap, stage1: np.ndarray
) -> dict[str, Any]:
    """Compare an operating point with the static budgets, in one unit of cost.

    Args:
        own: of the operating point, P = 1, deciding included. static: of the K budgets; the last is the largest.
        stage1: (N,) cost of deciding.

    Returns:
        `cost`, `stage1`, `largest`: mean costs. `cost_share`, `stage1_share`: of the largest budget's cost.
        `equal_accuracy`: what static budgets cost at the same accuracy, `step` (the cheapest `budget`) and `mixed`;
        each with `cost` and `cost_share`, the operating point's part of that. Where no static budget is as accurate
        both are None, and in such a resample the most costly budget stands in, which understates what is saved;
        `reached` is the share of resamples in which one was. `equal_cost`: `accuracy` of static budgets mixed at
        random at the same mean cost, and the operating point's `gain` over it.
    """

    def figures(cost: np.ndarray, score: np.ndarray, fixed_cost: np.ndarray, fixed_score: np.ndarray) -> list[float]:
        step, line = (Frontier.of(fixed_cost, fixed_score, mixed) for mixed in (False, True))
        equal = step.cost_of(score[0]), line.cost_of(score[0])
        bought = float(line.at(cost[0]))
        return [cost[0], fixed_cost[-1], *equal, bought, score[0] - bought]

    draws = zip(*own.resampled(bootstrap), *static.resampled(bootstrap), strict=True)
    cost, largest, *equal, bought, gain = figures(*own.means(), *static.means())
    drawn = np.array([figures(*each) for each in draws]).T
    dearest = static.resampled(bootstrap)[0].max(1)
    first = stage1.mean() / largest
    out: dict[str, Any] = {
        "cost": cost,
        "stage1": float(stage1.mean()),
        "largest": largest,
        "cost_share": _figure(cost / largest, drawn[0] / drawn[1]),
        "stage1_share": float(first),
        "equal_accuracy": {},
        "equal_cost": {"accuracy": _number(bought), "gain": _figure(gain, drawn[5])},
    }
    for name, value, column in zip(("step", "mixed"), equal, drawn[2:4], strict=True):
        reached = np.isfinite(column)
        share = drawn[0] / np.where(reached, column, dearest)
        out["equal_accuracy"][name] = {
            "cost": _number(value),
            "cost_share": _figure(cost / value if np.isfinite(value) else float("nan"), share),
            "reached": float(reached.mean()),
        }
    fixed_cost, _ = static.means()
    found = np.flatnonzero(fixed_cost == equal[0])
    out["equal_accuracy"]["step"]["budget"] = budgets[int(found[0])] if len(found) else None
    return out


def lost_to_best(score: np.ndarray, static: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean loss of scores (N,) against the column of (N, K) that is best on the same cases, in every resample."""
    drawn = np.stack([bootstrap.means(v) for v in static.T]).max(0) - bootstrap.means(score)
    return _figure(float(static.mean(0).max() - score.mean()), drawn)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _figure(value: float, draws: np.ndarray) -> dict[str, Any]:
    """A value with the 95 % percentile interval of its resamples; None if undefined."""
    if not np.isfinite(value):
        return {"value": None, "ci95": None}
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"value": float(value), "ci95": [float(low), float(high)]}
