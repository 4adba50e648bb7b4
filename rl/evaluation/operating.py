"""The operating price, chosen on validation cases by choices made out of fold.

`one_error`: the cheapest price that loses no more than `tolerance`, or than its own standard error where that is
larger, against the best of all prices and static budgets. `within`: the cheapest price whose mean score is at most
`tolerance` below that of the best static budget; no allowance is made for noise. In both, if no price does, the one
that loses least. `evaluation.price` sets it by hand instead, and the objective `dual` by its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.score_table import ScoreTable
from rewards.bootstrap import Bootstrap
from rl.deciders.base import Decisions
from rl.frontier.points import pick_price
from rl.recipe import EvaluationOptions


def operating_price(
    decided: Sequence[Decisions],
    table: ScoreTable,
    options: EvaluationOptions,
    bootstrap: Bootstrap,
    fixed: float | None = None,
) -> dict[str, Any]:
    """The price and what it was chosen by.

    Args:
        decided: out-of-fold decisions about the validation cases, one for each price of the curve.
        table: of these cases, the ladder's columns. bootstrap: over them.
        fixed: the price, where no rule chooses it.

    Returns:
        `rule`, `tolerance`, `price`; `val`: of each price `{price, accuracy, flops, lost, error}`, `lost` being what
        the rule compares, with its standard error.
    """
    static = table.score.T
    rivals = list(static) if options.operating == "within" else [*(d.score for d in decided), *static]
    best = max(rivals, key=np.mean)
    lost = [best - d.score for d in decided]
    mean, errors = [float(v.mean()) for v in lost], [bootstrap.error(v) for v in lost]
    costs = [float(d.cost.mean()) for d in decided]
    allowed = errors if options.operating == "one_error" else [0.0] * len(errors)
    chosen = decided[pick_price(mean, allowed, costs, options.tolerance)].price
    rows = zip(decided, costs, mean, errors, strict=True)
    return {
        "rule": options.operating if fixed is None else "price",
        "tolerance": options.tolerance,
        "price": chosen if fixed is None else fixed,
        "val": [
            {"price": d.price, "accuracy": float(d.score.mean()), "flops": c, "lost": m, "error": e}
            for d, c, m, e in rows
        ],
    }
