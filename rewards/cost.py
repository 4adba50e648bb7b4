"""Rewards that subtract the cost of visual tokens.

The presets are pure functions of a score s in 0..1 and a cost, over numbers, numpy arrays or torch tensors, broadcast
as usual; the allocator learns from them. An output without a readable budget has cost NaN and counts as a wrong answer
at full cost, so that it is never better than anything that could be read. A NaN score, of a row that cannot be scored,
stays NaN. `rewards/priced.py` has them in TRL's form.

What each budget of a ladder is worth for a case: the presets of `rewards/cost.py` over a score table.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from frugalpath.errors import InputError

BIRR_CAP = 256  # tokens; the published threshold is C = min(native tokens, 256)
MAX_CHARS = 10_000  # a budget further into the answer than this is not looked for

# The first whole number of 2 or more that is not a part of a decimal, a negative number, a grouped number or a word.
_BUDGET = re.compile(r"(?<![\w.,+-])0*+([2-9]|[1-9][0-9]{1,6})(?!\w|[.,][0-9])")


def parse_budget(answer_text: str | None) -> int | None:
    """The token budget that an allocator's answer asks for: its first integer of 2 or more, at most 7 digits.

    Args:
        answer_text: the text inside the answer block; None when there is none.
    """
    match = _BUDGET.search((answer_text or "")[:MAX_CHARS])
    return int(match[1]) if match else None


def linear(score: Any, cost: Any, price: Any, worst_cost: Any = 1.0) -> Any:
    """s - price * cost.

    Args:
        score: s in 0..1.
        cost: in any unit, usually a share of the largest budget's cost; not clipped. NaN: no readable budget.
        price: 0 or more, per unit of cost.
        worst_cost: the largest cost that can occur, which is what NaN pays.
    """
    score, cost = _settled(score, cost, worst_cost)
    return score - price * cost


def threshold(score: Any, tokens: Any, cap: Any, factor: float = 0.5) -> Any:
    """s below the cap, factor * s at or above it, 0 for NaN tokens: the published token reward, for arrays."""
    score, tokens = _settled(score, tokens, cap)
    below = tokens < cap
    return score * library_of(below).where(below, 1.0, factor)


def birr(answer_text: str | None, native: int, score: float) -> float:
    """Published token reward of one allocator answer (BiRR4CPath).

    Args:
        answer_text: the text inside the answer block, None when there is none; see `parse_budget`.
        native: tokens of the image at its own resolution.
        score: the frozen performer's score with the budget the answer asks for; not used when none could be read.
    """
    budget = parse_budget(answer_text)
    return 0.0 if budget is None else float(threshold(score, budget, min(native, BIRR_CAP)))


def visionthink(
    score: Any,
    form: Any,
    high: Any,
    theta: float = 0.2,
    penalty: float = 0.1,
    form_weight: float = 0.5,
    right_from: float = 0.5,
) -> Any:
    """s + 0.5 * form - 0.1 * [low and r < theta, or high and r >= theta], with r = C_low / (C_low + C_high).

    VisionThink (2507.13348): where hardly any right answer of a group came from the cheap look, cheap looks pay, since
    their hits are luck; elsewhere expensive ones do. With no right answer at all r is 0 / 0, which the paper leaves
    open: here nobody pays then, because the group says nothing about which look the case needs, and with advantages
    scaled by the group's own spread the penalty would be all that such a group teaches.

    Args:
        score: s in 0..1, (..., group).
        form: 1 where the completion has the required form, 0 elsewhere, (..., group).
        high: 1 where the image was seen at high resolution, 0 where it was not, (..., group); NaN: unreadable, which
            counts as wrong, without form, and pays.
        theta: share of right answers below which the cheap look is luck.
        penalty: 0 or more.
        form_weight: 0 or more.
        right_from: least score that counts as right; the paper's scores are 0 and 1.
    """
    library = library_of(score, form, high)
    score, form, high = (_array(value, library) for value in (score, form, high))
    known = ~library.isnan(high)
    right = known & (score >= right_from)
    low_right = (right & (high == 0)).sum(axis=-1, keepdims=True)
    all_right = right.sum(axis=-1, keepdims=True)
    rare = low_right / library.where(all_right > 0, all_right, 1) < theta
    pays = known & (all_right > 0) & (rare == (high == 0))
    worth = score + form_weight * form
    return library.where(known, library.where(pays, worth - penalty, worth), -penalty)


def dual_price(price: float, cost: Any, target: float, step: float = 0.1, worst_cost: float = 1.0) -> float:
    """The price for the next batch, by a step of dual ascent on the constraint that the mean cost be the target.

    With `linear` this is the Lagrangian of the highest score at that mean cost. The price is all the state there is.

    Args:
        price: of this batch.
        cost: of the answers of this batch, (n,), n >= 1, in any unit; NaN: no readable budget.
        target: mean cost to aim at, in the same unit.
        step: rise of the price per unit of cost above the target.
        worst_cost: the largest cost that can occur, which is what NaN counts as.

    Returns:
        A price of 0 or more.
    """
    cost = np.asarray(cost, dtype=np.float64)
    return max(0.0, price + step * (float(np.where(np.isnan(cost), worst_cost, cost).mean()) - target))


def _settled(score: Any, cost: Any, worst: Any) -> tuple[Any, Any]:
    """Replace score and cost by 0 and `worst` where the cost is NaN."""
    library = library_of(score, cost, worst)
    cost = _array(cost, library)
    known = ~library.isnan(cost)
    return library.where(known, score, 0.0), library.where(known, cost, worst)


def _array(value: Any, library: Any) -> Any:
    """A number in float64, which as a 0-d tensor neither loses digits nor widens a float32 tensor it meets."""
    if type(value).__module__.partition(".")[0] == "torch":
        return value
    return library.asarray(value, dtype=library.float64)


def library_of(*values: Any) -> Any:
    """torch if one of the values is a tensor, else numpy; torch is not imported for numbers and arrays."""
    if any(type(value).__module__.partition(".")[0] == "torch" for value in values):
        import torch

        return torch
    return np


OBJECTIVES = ("linear", "birr", "visionthink", "dual")
"""`dual` is `linear` at a price that whoever learns moves, by `rewards.cost.dual_price`, until a mean cost is met."""
OF_GROUPS = ("visionthink",)
"""These compare a case's budgets with each other: the worth of a mean score is not the mean worth."""
REMOVED = ("multiplicative", "log", "oracle_regret")
"""Presets of earlier versions, whose rewards were called `<preset>_cost`."""
INSTEAD = "no measurement of the project favours it over"
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
    raise InputError(f"objective: {objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")


def birr_cap(cap: Any) -> Any:
    """Tokens from which the published reward is halved: those of the largest budget, at most 256."""
    return cap.clip(max=BIRR_CAP) if hasattr(cap, "clip") else min(cap, BIRR_CAP)
