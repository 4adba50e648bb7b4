"""Budgets in sequence, stopped by the performer's own confidence: pure functions of score tables.

After an answer at one rung, the scores that it and every later rung may be expected to reach are forecast from what
the performer said so far. It goes on while some later rung is worth more than its price, with every look on the way
paid for, and keeps the answer that is most likely right of all that it was given. The forecast is fitted once and
serves every price.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from frugalpath.allocator.forecast import Forecast, Observations
from frugalpath.allocator.score_table import chosen
from frugalpath.files import atomic_write

ENOUGH = 100
"""Validation cases of a kind of question from which on it has a plan of its own."""


@dataclass(frozen=True)
class Plan:
    """How to go from rung to rung.

    Args:
        start: rung of the first look.
        jump: go straight to the rung that is worth most; otherwise one rung at a time.
    """

    start: int
    jump: bool

    def move(self, expected: np.ndarray, last: int, cost: np.ndarray, price: float) -> np.ndarray:
        """The next rung (N,) after a look at `last`, which is not the last of all; `last` itself where it stops.

        Args:
            expected: (N, K - last), see `Forecast.expected`.
            cost: (K + 1, K) mean cost of a look at a rung: first of all (row 0), or right after rung j (row 1 + j).
        """
        later = np.arange(last + 1, cost.shape[1])
        steps = cost[1 + last, later] if self.jump else np.cumsum(cost[later, later])
        gain = expected[:, 1:] - expected[:, :1] - price * steps
        best = gain.argmax(1)
        return np.where(gain.max(1) > 0, last + 1 + (best if self.jump else 0), last)


def walk(
    plan: Plan,
    forecast: Forecast,
    seen: Observations,
    fold: np.ndarray,
    flops: np.ndarray,
    cost: np.ndarray,
    price: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What N cases are answered with, and what all their looks cost.

    Args:
        fold: (N,) which fit forecasts a case. flops: (N, K + 1, K) of looks, as `cost` of `Plan.move`, which decides.

    Returns:
        Rungs (N,) whose answer is kept, FLOPs (N,), and which rungs (N, K) were looked at.
    """
    n, rungs = seen.confidence.shape
    at, looked = np.full(n, plan.start), np.zeros((n, rungs), dtype=bool)
    spent, going = flops[:, 0, plan.start].astype(float), np.ones(n, dtype=bool)
    for last in range(plan.start, rungs - 1):
        here = np.flatnonzero(going & (at == last))
        looked[here, last] = True
        if not len(here):
            continue
        to = plan.move(forecast.expected(seen.at(here), last, looked[here], fold[here]), last, cost, price)
        going[here] = to > last
        on = here[to > last]
        spent[here] += forecast.flops
        spent[on] += flops[on, 1 + last, to[to > last]]
        at[here] = to
    looked[np.arange(n), at] = True
    return forecast.best(seen, looked, fold), spent, looked


def best_plan(
    forecast: Forecast,
    seen: Observations,
    fold: np.ndarray,
    score: np.ndarray,
    flops: np.ndarray,
    cost: np.ndarray,
    price: float,
    largest: float,
) -> Plan:
    """The plan of the highest mean score minus price times cost; N cases by fits that had not seen them.

    Args:
        score: (N, K). largest: FLOPs that a cost of 1 stands for.
    """
    plans = [Plan(start, jump) for start in range(score.shape[1]) for jump in (False, True)]

    def worth(plan: Plan) -> float:
        rungs, spent, _ = walk(plan, forecast, seen, fold, flops, cost, price)
        return float((chosen(score, rungs) - price * spent / largest).mean())

    return max(plans, key=worth)


def stop_when_sure(
    confidence: np.ndarray, flops: np.ndarray, threshold: float, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Without any training: one rung after another until the confidence (N, K) reaches a threshold.

    Args:
        start: first rung.

    Returns:
        Rungs (N,) and FLOPs (N,) of all looks.
    """
    rung = np.arange(confidence.shape[1])
    enough = (confidence >= threshold) & (rung >= start)
    enough[:, -1] = True
    at = enough.argmax(1)
    steps = flops[:, rung, rung]
    steps = np.where(rung == start, flops[:, 0], steps)
    return at, np.where((rung >= start) & (rung <= at[:, None]), steps, 0).sum(1)


def best_threshold(
    confidence: np.ndarray, score: np.ndarray, flops: np.ndarray, price: float, largest: float
) -> tuple[float, int]:
    """Threshold and start of `stop_when_sure` of the highest mean score minus price times cost."""
    quantiles = np.quantile(confidence, np.linspace(0.02, 0.98, 49)).tolist()
    candidates = [(float(t), k) for k in range(score.shape[1]) for t in (0.0, *quantiles, np.inf)]

    def worth(candidate: tuple[float, int]) -> float:
        rungs, spent = stop_when_sure(confidence, flops, *candidate)
        return float((chosen(score, rungs) - price * spent / largest).mean())

    return max(candidates, key=worth)


@dataclass(frozen=True)
class Experience:
    """What escalation learnt from N validation cases; it makes a plan for any price and kind of question.

    The question is known before the first look, so that each kind may start elsewhere.

    Args:
        forecast: fitted on them. fold: (N,) the fit that had not seen a case's patient.
        seen: what the performer said. score: (N, K). flops: (N, K + 1, K) of looks, see `walk`.
        kind: of question, where these are the cases of one kind alone.
        largest: FLOPs that a cost of 1 stands for; by default of a fresh look at the largest budget.
    """

    forecast: Forecast
    fold: np.ndarray
    seen: Observations
    score: np.ndarray
    flops: np.ndarray
    kind: str | None = None
    largest: float = 0.0

    def __post_init__(self) -> None:
        if not self.largest:
            object.__setattr__(self, "largest", float(self.flops[:, 0, -1].mean()))

    @cached_property
    def kinds(self) -> dict[str, Experience]:
        """Its part about each kind of question that has `ENOUGH` cases."""
        found = {}
        for kind in self.forecast.kinds:
            at = np.flatnonzero(self.seen.questions == kind)
            if len(at) >= ENOUGH:
                own = self.fold[at], self.seen.at(at), self.score[at], self.flops[at]
                found[kind] = Experience(self.forecast, *own, kind, self.largest)
        return found

    def about(self, kind: str) -> Experience:
        """Its part about a kind of question, or all of it where there are too few of the kind."""
        return self.kinds.get(kind, self)

    @cached_property
    def cost(self) -> np.ndarray:
        """Mean cost (K + 1, K) of looks, the largest fresh one = 1."""
        return self.flops.mean(0) / self.largest

    def whole(self, count: int) -> np.ndarray:
        """Fold (N,) of new cases: that of the fit that has seen all."""
        return np.full(count, len(self.forecast.weights) - 1)

    def plan(self, price: float) -> Plan:
        """What is best at a price, by fits that had not seen the patient."""
        known = (self.forecast, self.seen, self.fold, self.score, self.flops, self.cost)
        return best_plan(*known, price, self.largest)

    def save(self, path: Path) -> None:
        """Write as arrays, atomically. Of rare answers only is kept whether they are the same."""
        kept = np.isin(np.stack([self.seen.answers(k) for k in range(self.score.shape[1])], 1), self.forecast.answers)
        text = [[t if k else "" for t, k in zip(*row, strict=True)] for row in zip(self.seen.text, kept, strict=True)]
        for row, own in zip(text, self.seen.text, strict=True):
            names = {t: f"~{i}" for i, t in enumerate(dict.fromkeys(own.tolist()))}
            row[:] = [t or names[o] for t, o in zip(row, own, strict=True)]
        arrays = {
            "weights": self.forecast.weights,
            "kept": self.forecast.kept,
            "kinds": np.array(self.forecast.kinds, dtype=np.str_),
            "answers": np.array(self.forecast.answers, dtype=np.str_),
            "fold": self.fold,
            "confidence": self.seen.confidence,
            "text": np.array(text, dtype=np.str_),
            "questions": self.seen.questions,
            "score": self.score,
            "flops": self.flops,
        }
        with atomic_write(path) as part, part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Experience:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as kept:
            forecast = Forecast(kept["kinds"].tolist(), kept["answers"].tolist(), kept["weights"], kept["kept"])
            seen = Observations(kept["confidence"], kept["text"], kept["questions"])
            return cls(forecast, kept["fold"], seen, kept["score"], kept["flops"])
