"""Wall time of deciding and of answering, one case at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.case import Case
from models.performer import Performer
from rl.deciders.base import Decider, Decisions

TIMED = 32
"""Cases that are timed, spread over those that there are."""
WARM = 3
"""Of them, how many are answered beforehand without being timed, at every budget."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the timed cases at batch size 1; their images are read and encoded beforehand.

    Args:
        answer: of an answer at each budget, (T,). look: of deciding at each price, (T,).
    """

    answer: dict[int, np.ndarray]
    look: dict[float, np.ndarray]

    def budgets(self, ladder: Sequence[int]) -> np.ndarray:
        """Median (K,) of an answer."""
        return np.array([float(np.median(self.answer[b])) for b in ladder])

    def deciding(self, price: float) -> float:
        """Median of deciding."""
        return float(np.median(self.look[price]))

    def to_dict(self, price: float) -> dict[str, Any]:
        """`answer` by budget and `look` at the operating price, each with median and quartiles."""
        answer = {str(b): _spread(t) for b, t in self.answer.items()}
        return {"cases": len(self.look[price]), "warm_up": WARM, "answer": answer, "look": _spread(self.look[price])}


def measure(
    performer: Performer,
    decider: Decider,
    cases: Sequence[Case],
    decisions: Sequence[Decisions],
    max_new_tokens: int,
) -> Latency:
    """Time answers at every budget, and deciding at every price.

    Args:
        decisions: about these cases, one for each price. Deciding is timed once for prices at which it costs the same.
    """
    sample = list(cases[:: max(1, len(cases) // TIMED)][:TIMED])
    answer = {}
    for budget in decider.ladder:
        for case in sample:
            performer.prompt(case, budget)
        warm = sample[:WARM]
        performer.answer(warm, [budget] * len(warm), max_new_tokens, 1)
        answers = performer.answer(sample, [budget] * len(sample), max_new_tokens, 1)
        answer[budget] = 1000 * np.array([a.seconds for a in answers])
    by_cost: dict[float, np.ndarray] = {}
    look = {}
    for decided in decisions:
        cost = float(decided.look.mean())
        if cost not in by_cost:
            decider.look_ms(sample[:WARM], decided.price)
            by_cost[cost] = decider.look_ms(sample, decided.price)
        look[decided.price] = by_cost[cost]
    return Latency(answer, look)


def _spread(times: np.ndarray) -> dict[str, Any]:
    low, middle, high = (float(q) for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return {"median_ms": middle, "quartiles_ms": [low, high]}
