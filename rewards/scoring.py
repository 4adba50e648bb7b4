"""Score of an answer: the weighted mean of the rewards that say whether it is correct."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from frugalpath.envs.case import Case, case_columns, extra_columns
from frugalpath.errors import InputError
from frugalpath.rewards.registry import RewardFunction


class Scorer:
    """Score answers by the recipe's rewards, without those that only shape training.

    Args:
        rewards: the recipe's rewards.
        max_budget: the largest budget of the ladder, for the column of that name.
    """

    def __init__(self, rewards: Sequence[RewardFunction], max_budget: int):
        self.rewards = [r for r in rewards if r.score_weight > 0]
        if not self.rewards:
            raise InputError("rewards: none of them says whether an answer is right; add choice, ap50 or your own")
        self.max_budget = max_budget

    def __call__(
        self, texts: Sequence[str], cases: Sequence[Case], budgets: Sequence[int], tokens: Sequence[int]
    ) -> np.ndarray:
        """Scores (N,) of completions.

        Raises:
            InputError: no reward applies to a case (all returned None); the message names it.
        """
        extra = extra_columns(cases)
        rows = [case_columns(c, extra) for c in cases]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        columns.update(budget=list(budgets), tokens=list(tokens), max_budget=[self.max_budget] * len(cases))
        values = np.array(
            [[np.nan if v is None else float(v) for v in r(completions=list(texts), **columns)] for r in self.rewards]
        )
        weights = np.array([r.score_weight for r in self.rewards])[:, None] * ~np.isnan(values)
        if (weights.sum(0) == 0).any():
            case = cases[int(np.argmax(weights.sum(0) == 0))]
            names = ", ".join(r.__name__ for r in self.rewards)
            raise InputError(
                f"case {case.id}: no reward scores its task {case.task!r} (asked: {names}); "
                "add one that does to `rewards`"
            )
        return (np.nan_to_num(values) * weights).sum(0) / weights.sum(0)
