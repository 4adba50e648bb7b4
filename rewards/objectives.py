"""What each budget of a ladder is worth for a case: the presets of `rewards/cost.py` over a score table."""

from __future__ import annotations

import math
from typing import Any

from rewards.cost import BIRR_CAP, library_of, linear, threshold, visionthink
from slides.errors import InputError

OBJECTIVES = ("linear", "birr", "visionthink", "dual")
"""`dual` is `linear` at a price that whoever learns moves, by `rewards.cost.dual_price`, until a mean cost is met."""
OF_GROUPS = ("visionthink",)
"""These compare a case's budgets with each other: the worth of a mean score is not the mean worth."""
REMOVED = ("multiplicative", "log", "oracle_regret")
"""Presets of earlier versions, whose rewards were called `<preset>_cost`."""
INSTEAD = "no figure of the project speaks for it over"
"""Why they went; what to write comes after it."""
LOW_SHARE = 0.25
"""Share of the largest budget up to which a look is a cheap one, as in `visionthink_cost`."""


def worth(
    objective: str,
    score: Any,
    tokens: Any,
    cost: Any,
    price: Any,
    cap: Any = None,
) -> Any:
    """Reward (N, K) of every case at every budget.

    Args:
        objective: one of `OBJECTIVES`.
        score: (N, K) in 0..1, numpy or torch; NaN where an answer could not be read or scored, which is worth no more
            than anything else that any case can get.
        tokens: (K,) or (N, K) visual tokens. cost: (K,) or (N, K), the largest budget = 1.
        price: of the largest budget, a number or (N, 1), 0 or more.
        cap: tokens of the largest budget, a number or for `birr` (N, 1); the most of `tokens` by default.

    Raises:
        InputError: the objective is not known.
    """
    library = library_of(score)
    if library.__name__ == "numpy":
        score, tokens, cost = (library.asarray(v, dtype=float) for v in (score, tokens, cost))
    else:
        tokens, cost = (library.as_tensor(v, dtype=score.dtype) for v in (tokens, cost))
    cap = float(tokens.max()) if cap is None else cap
    worst = float(cost.max())
    lost = library.isnan(score)
    score = library.where(lost, 0.0, score)
    tokens, cost = (library.where(lost, math.nan, v) for v in (tokens, cost))
    if objective in ("linear", "dual"):
        return linear(score, cost, price, max(1.0, worst))
    if objective == "birr":
        return threshold(score, tokens, birr_cap(cap))
    if objective == "visionthink":
        high = library.where(lost, math.nan, library.where(tokens > LOW_SHARE * cap, 1.0, 0.0))
        return visionthink(score, library.zeros_like(score), high)
    raise InputError(f"objective: {objective!r} is not known; known are {', '.join(OBJECTIVES)}")


def birr_cap(cap: Any) -> Any:
    """Tokens from which the published reward is halved: those of the largest budget, at most 256."""
    return cap.clip(max=BIRR_CAP) if hasattr(cap, "clip") else min(cap, BIRR_CAP)
