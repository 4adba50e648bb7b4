"""What an answer is worth once its visual tokens are paid for.

The presets are pure functions of a score s in 0..1 and a cost, over numbers, numpy arrays or torch tensors, broadcast
as usual; the allocator learns from them. An output without a readable budget has cost NaN and counts as a wrong answer
at full cost, so that it is never better than anything that could be read. A NaN score, of a row that cannot be scored,
stays NaN. The rewards of the same names with `_cost` are in TRL's form, for a policy that is trained on its own; in
joint training the cost is the allocator's alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rewards.answer import Completion, extract_answer
from rewards.registry import column, get_reward, reward
from slides.errors import InputError

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


def multiplicative(score: Any, cost: Any, price: Any) -> Any:
    """s * (1 - price * cost), the factor not below 0: nothing is paid for wrong answers. Arguments as for `linear`."""
    score, cost = _settled(score, cost, 1.0)
    factor = 1.0 - price * cost
    return score * _library(factor).clip(factor, 0.0, None)


def log(score: Any, tokens: Any, cap: Any, price: Any, n_min: float = 1.0) -> Any:
    """s - price * log2(n / n_min) / log2(cap / n_min): each doubling of the tokens costs the same.

    Args:
        score: s in 0..1.
        tokens: n, held to n_min..cap; NaN: no readable budget.
        cap: tokens of the largest budget; where it is not above n_min there is no choice and the cost is 0.
        price: what the largest budget costs, 0 or more.
        n_min: tokens of the smallest budget, which is free.
    """
    score, tokens = _settled(score, tokens, cap)
    share = tokens / n_min, cap / n_min
    library = _library(*share)
    doublings, most = (library.log2(library.clip(_array(ratio, library), 1.0, None)) for ratio in share)
    return score - price * library.clip(doublings / library.where(most > 0, most, math.inf), 0.0, 1.0)


def threshold(score: Any, tokens: Any, cap: Any, factor: float = 0.5) -> Any:
    """s below the cap, factor * s at or above it, 0 for NaN tokens: the published token reward, for arrays."""
    score, tokens = _settled(score, tokens, cap)
    below = tokens < cap
    return score * _library(below).where(below, 1.0, factor)


def birr(answer_text: str | None, native: int, score: float) -> float:
    """Published token reward of one allocator answer (BiRR4CPath).

    Args:
        answer_text: the text inside the answer block, None when there is none; see `parse_budget`.
        native: tokens of the image at its own resolution.
        score: the frozen performer's score with the budget the answer asks for; not used when none could be read.
    """
    budget = parse_budget(answer_text)
    return 0.0 if budget is None else float(threshold(score, budget, min(native, BIRR_CAP)))


@reward("linear_cost")
def linear_cost(
    completions: Sequence[Completion],
    max_budget: Sequence[float | None],
    tokens: Sequence[float | None] | None = None,
    budget: Sequence[float | None] | None = None,
    score: str | Mapping[str, Any] | None = None,
    price: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """`linear` in the visual tokens of the row: -price * tokens / max_budget, plus the score where one is named.

    A completion without an answer is charged as wrong at the largest budget.

    Args:
        completions: n completions.
        max_budget: tokens of the largest budget.
        tokens: realised visual tokens; where a row has none, its `budget` is taken.
        budget: requested visual tokens.
        score: the reward that gives s, a name or a spec as for `get_reward`; by default there is none and the value is
            the penalty alone, to stand beside other rewards.
        price: what the largest budget costs; at 0.5 a right answer with all tokens is worth half.
        columns: all other columns, for `score`.

    Returns:
        n values; None where the row has no budget or `score` gives None.

    Example:
        >>> linear_cost(["<answer>benign</answer>"], max_budget=[256], tokens=[64], price=0.4)
        [-0.1]
    """
    given = columns | {"max_budget": max_budget, "tokens": tokens, "budget": budget}
    return _priced(completions, score, given, price, lambda s, n, cap: linear(s, n / cap, price))


@reward("multiplicative_cost")
def multiplicative_cost(
    completions: Sequence[Completion],
    max_budget: Sequence[float | None],
    score: str | Mapping[str, Any],
    tokens: Sequence[float | None] | None = None,
    budget: Sequence[float | None] | None = None,
    price: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """`multiplicative` in the visual tokens of the row, s * (1 - price * tokens / max_budget).

    As `linear_cost`, but `score` has to be named: put it in the place of that reward, not beside it.
    """
    given = columns | {"max_budget": max_budget, "tokens": tokens, "budget": budget}
    return _priced(completions, score, given, price, lambda s, n, cap: multiplicative(s, n / cap, price))


@reward("log_cost")
def log_cost(
    completions: Sequence[Completion],
    max_budget: Sequence[float | None],
    tokens: Sequence[float | None] | None = None,
    budget: Sequence[float | None] | None = None,
    score: str | Mapping[str, Any] | None = None,
    price: float = 0.5,
    n_min: float = 1.0,
    **columns: Any,
) -> list[float | None]:
    """`log` in the visual tokens of the row, with `n_min` tokens free; otherwise as `linear_cost`."""
    given = columns | {"max_budget": max_budget, "tokens": tokens, "budget": budget}
    return _priced(completions, score, given, price, lambda s, n, cap: log(s, n, cap, price, n_min))


def _priced(
    completions: Sequence[Completion],
    score: str | Mapping[str, Any] | None,
    columns: dict[str, Any],
    price: float,
    outcome: Callable[[float, float, float], Any],
) -> list[float | None]:
    """`outcome(s, tokens, cap)` for each completion that has all three, None for the others."""
    if price < 0:
        raise InputError(f"`price` is {price}; a cost is subtracted already, so give 0 or more")
    n = len(completions)
    scores = [0.0] * n if score is None else get_reward(score)(completions, **columns)
    values: list[float | None] = []
    for completion, s, realised, requested, cap in zip(
        completions, scores, *(column(columns[c], n) for c in ("tokens", "budget", "max_budget")), strict=True
    ):
        tokens = realised if _is_count(realised) else requested
        if s is None or not _is_count(tokens) or not _is_count(cap):
            values.append(None)
        elif extract_answer(completion) is None:
            values.append(float(outcome(s, math.nan, float(cap))))
        else:  # rounding to the image grid may realise a few tokens more than the budget
            values.append(float(outcome(s, float(min(tokens, cap)), float(cap))))
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(0 < value < math.inf)


def _settled(score: Any, cost: Any, worst: Any) -> tuple[Any, Any]:
    """Score and cost with 0 and `worst` in the place of what has cost NaN."""
    library = _library(score, cost, worst)
    cost = _array(cost, library)
    known = ~library.isnan(cost)
    return library.where(known, score, 0.0), library.where(known, cost, worst)


def _array(value: Any, library: Any) -> Any:
    """A number in float64, which as a 0-d tensor neither loses digits nor widens a float32 tensor it meets."""
    if type(value).__module__.partition(".")[0] == "torch":
        return value
    return library.asarray(value, dtype=library.float64)


def _library(*values: Any) -> Any:
    """torch if one of the values is a tensor, else numpy; torch is not imported for numbers and arrays."""
    if any(type(value).__module__.partition(".")[0] == "torch" for value in values):
        import torch

        return torch
    return np
