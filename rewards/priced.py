"""`linear_cost` and its kin: the presets of `rewards/cost.py` in TRL's form, for a policy that is trained on its own.

There are two kinds. Of a policy that answers, the cost is the visual tokens of the row, and the score comes from
another reward: `linear_cost`, `visionthink_cost`, `dual_cost`. Of a policy that is asked for a budget, the answer
itself is the cost, and what it is worth comes from a sweep of the frozen performer, as columns: `birr_cost`. In joint
training the cost is the allocator's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from frugalpath.errors import InputError
from frugalpath.rewards.answer import Completion, extract_answer, form_of
from frugalpath.rewards.cost import birr, dual_price, linear, parse_budget, visionthink
from frugalpath.rewards.registry import column, get_reward, reward, warn_unscorable

DUAL_COST = "dual_cost/cost"  # the metric in TRL's log from which the price follows


class _Priced(NamedTuple):
    """Score and cost of a completion."""

    score: float
    tokens: float  # NaN: it gives no answer
    cap: float


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
    if price < 0:
        raise InputError(f"`price` is {price}; a cost is subtracted already, so give 0 or more")
    return [_after_cost(spent, price) for spent in _spent(completions, score, given)]


@reward("visionthink_cost")
def visionthink_cost(
    completions: Sequence[Completion],
    max_budget: Sequence[float | None],
    id: Sequence[Any],
    score: str | Mapping[str, Any],
    tokens: Sequence[float | None] | None = None,
    budget: Sequence[float | None] | None = None,
    low_share: float = 0.25,
    theta: float = 0.2,
    penalty: float = 0.1,
    form_weight: float = 0.5,
    **columns: Any,
) -> list[float | None]:
    """`visionthink` over the rows that share an `id`: score + form - penalty for the look the case does not need.

    The strict form of `format` is part of it, so do not list `format` beside it. With several processes a group is
    what one of them holds of it; a batch size per device that is a multiple of `num_generations` keeps groups whole.

    Args:
        completions: n completions.
        max_budget: tokens of the largest budget.
        id: case of each row. (Prompts do not tell cases apart: they hold images, and joint training varies them.)
        score: the reward that gives s, a name or a spec as for `get_reward`; half or more counts as right.
        tokens: realised visual tokens; where a row has none, its `budget` is taken.
        budget: requested visual tokens.
        low_share: up to this share of `max_budget` a look is a cheap one; a quarter of the pixels in the paper.
        theta: share of right answers below which the cheap look is luck.
        penalty: 0 or more.
        form_weight: 0 or more.
        columns: all other columns, for `score`.

    Returns:
        n values in -penalty..1 + form_weight; None where the row has no budget or `score` gives None.
    """
    _not_negative("visionthink_cost", penalty=penalty, form_weight=form_weight)
    given = columns | {"max_budget": max_budget, "tokens": tokens, "budget": budget, "id": id}
    found = _spent(completions, score, given)
    groups: dict[str, list[int]] = {}
    for at, (case, spent) in enumerate(zip(id, found, strict=True)):
        if spent is not None:
            groups.setdefault(str(case), []).append(at)
    values: list[float | None] = [None] * len(completions)
    for rows in groups.values():
        group = [spent for at in rows if (spent := found[at]) is not None]
        share = np.array([spent.tokens / spent.cap for spent in group])
        high = np.where(np.isnan(share), math.nan, share > low_share)
        form = [float(form_of(completions[at]).strict) for at in rows]
        worth = visionthink([spent.score for spent in group], form, high, theta, penalty, form_weight)
        for at, value in zip(rows, worth.tolist(), strict=True):
            values[at] = value
    return values


@reward("dual_cost")
def dual_cost(
    completions: Sequence[Completion],
    max_budget: Sequence[float | None],
    target: float,
    tokens: Sequence[float | None] | None = None,
    budget: Sequence[float | None] | None = None,
    score: str | Mapping[str, Any] | None = None,
    price: float = 0.0,
    step: float = 0.1,
    trainer_state: Any = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """`linear` at a price that rises while the mean share of the largest budget is above `target`, and falls below it.

    The price is made anew from TRL's log, which holds the mean cost of every logging step (`dual_cost/cost`, over all
    processes) and is a part of every checkpoint: all processes have the same price, and a resumed run goes on with it.
    It moves with `logging_steps`. Outside training the price is the first one.

    Args:
        completions: n completions.
        max_budget: tokens of the largest budget.
        target: mean share of the largest budget to aim at, 0..1.
        tokens: realised visual tokens; where a row has none, its `budget` is taken.
        budget: requested visual tokens.
        score: as for `linear_cost`.
        price: the first price, 0 or more.
        step: rise of the price per unit of cost above the target, 0 or more.
        trainer_state: TRL's.
        log_metric: TRL's.
        columns: all other columns, for `score`.

    Returns:
        n values; None where the row has no budget or `score` gives None.
    """
    _not_negative("dual_cost", price=price, step=step, target=target)
    for entry in getattr(trainer_state, "log_history", ()):
        if isinstance(cost := entry.get(DUAL_COST), (int, float)):
            price = dual_price(price, [cost], target, step)
    given = columns | {"max_budget": max_budget, "tokens": tokens, "budget": budget}
    given |= {"trainer_state": trainer_state, "log_metric": log_metric}  # `score` may ask for them
    found = _spent(completions, score, given)
    costs = [spent.tokens / spent.cap for spent in found if spent is not None]
    if log_metric is not None and costs:
        log_metric(DUAL_COST, float(np.nan_to_num(costs, nan=1.0).mean()))
        log_metric("dual_cost/price", price)
    return [_after_cost(spent, price) for spent in found]


@reward("birr_cost")
def birr_cost(
    completions: Sequence[Completion],
    native: Sequence[float | None],
    budgets: Sequence[Sequence[float] | None],
    scores: Sequence[Sequence[float] | None],
    id: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """`birr`, the published token reward, of a policy whose answer is a budget.

    The published code runs the performer at each answered budget. Here s is what the frozen performer scored in a
    sweep with the largest of `budgets` that the answer pays for; below all of them nothing is known, and s is 0.

    Args:
        completions: n completions; the first whole number of 2 or more in the answer is the budget.
        native: tokens of the image at its own resolution.
        budgets: the budgets of the sweep, a list a row.
        scores: the performer's score in 0..1 with each of them, a list a row.
        id: names rows in warnings.
        columns: not used.

    Returns:
        n values in 0..1, 0.0 for an answer without a budget; with a warning None for rows whose columns do not fit.
    """
    values: list[float | None] = []
    n = len(completions)
    for completion, own, asked, got, row_id in zip(completions, native, budgets, scores, column(id, n), strict=True):
        sweep = _sweep(asked, got)
        if sweep is None or not _is_count(own):
            problem = (
                f"`budgets` {asked!r} and `scores` {got!r} are not as long lists of numbers, or `native` is {own!r}"
            )
            warn_unscorable("birr_cost", str(row_id), problem)
            values.append(None)
            continue
        text = extract_answer(completion)
        affordable = [(tokens, s) for tokens, s in sweep if tokens <= (parse_budget(text) or 0)]
        values.append(birr(text, int(own), max(affordable)[1] if affordable else 0.0))
    return values


def _after_cost(spent: _Priced | None, price: float) -> float | None:
    return None if spent is None else float(linear(spent.score, spent.tokens / spent.cap, price))


def _spent(
    completions: Sequence[Completion], score: str | Mapping[str, Any] | None, columns: dict[str, Any]
) -> list[_Priced | None]:
    """Score, tokens and largest budget of each completion; None where its row has no budget or no score."""
    n = len(completions)
    scores = [0.0] * n if score is None else get_reward(score)(completions, **columns)
    found: list[_Priced | None] = []
    for completion, s, realised, requested, cap in zip(
        completions, scores, *(column(columns[c], n) for c in ("tokens", "budget", "max_budget")), strict=True
    ):
        tokens = realised if _is_count(realised) else requested
        if s is None or not _is_count(tokens) or not _is_count(cap):
            found.append(None)
        elif extract_answer(completion) is None:
            found.append(_Priced(s, math.nan, float(cap)))
        else:  # rounding to the image grid may realise a few tokens more than the budget
            found.append(_Priced(s, float(min(tokens, cap)), float(cap)))
    return found


def _sweep(budgets: Any, scores: Any) -> list[tuple[float, float]] | None:
    """Pairs of budget and score; None where the two are not lists of numbers of the same length."""
    if not all(isinstance(v, Iterable) and not isinstance(v, str) for v in (budgets, scores)):
        return None
    budgets, scores = list(budgets), list(scores)
    numbers = all(map(_is_count, budgets)) and all(
        isinstance(s, (int, float, np.number)) and 0 <= s <= 1 for s in scores
    )
    return list(zip(budgets, scores, strict=True)) if numbers and 0 < len(budgets) == len(scores) else None


def _not_negative(name: str, **values: float) -> None:
    if problems := [f"reward {name!r}: `{key}` is {v}; give 0 or more" for key, v in values.items() if not v >= 0]:
        raise InputError(problems)


def _is_count(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(0 < value < math.inf)
