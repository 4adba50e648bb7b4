"""What an answer is worth once its visual tokens are paid for.

The presets are pure functions of a score s in 0..1 and a cost, over numbers, numpy arrays or torch tensors, broadcast
as usual; the allocator learns from them. An output without a readable budget has cost NaN and counts as a wrong answer
at full cost, so that it is never better than anything that could be read. A NaN score, of a row that cannot be scored,
stays NaN. `rewards/priced.py` has them in TRL's form.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

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
    """Score and cost with 0 and `worst` in the place of what has cost NaN."""
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
