"""A budget is divided among the images and slides of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence


def share_out(budget: int, weights: Sequence[float], room: Sequence[float]) -> list[int]:
    """A budget in whole shares by weight; what is left over goes by largest remainder, to the first of equals.

    Weights that are whole numbers and sum to the budget are the shares themselves.

    Args:
        weights: a share without weight is nought.
        room: what each can take at most; what is more goes to the others.
    """
    total = sum(weights)
    if not budget or not total:
        return [0] * len(weights)
    quotas = [budget * weight / total for weight in weights]
    full = [at for at, quota in enumerate(quotas) if quota >= room[at]]
    if full:
        shares = [int(room[at]) if at in full else 0 for at in range(len(weights))]
        rest = [at for at in range(len(weights)) if at not in full]
        if rest:
            others = share_out(budget - sum(shares), [weights[at] for at in rest], [room[at] for at in rest])
            for at, share in zip(rest, others, strict=True):
                shares[at] = share
        return shares
    shares = [math.floor(quota + 1e-9) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda at: shares[at] - quotas[at])
    for at in order[: budget - sum(shares)]:
        shares[at] += 1
    return shares
