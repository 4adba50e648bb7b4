"""Divide a budget evenly among the images and slides of a case."""

from __future__ import annotations

from collections.abc import Sequence


def apportion(budget: int, room: Sequence[float]) -> list[int]:
    """Divide a budget into equal whole shares; the first get the remainder, one token each.

    Args:
        budget: in tokens.
        room: what each can take at most; what is more goes to the others.
    """
    shares, others = [0] * len(room), list(range(len(room)))
    while full := [at for at in others if room[at] * len(others) <= budget]:
        for at in full:
            shares[at] = int(room[at])
        budget -= sum(shares[at] for at in full)
        others = [at for at in others if at not in full]
    for place, at in enumerate(others):
        shares[at] = budget // len(others) + (place < budget % len(others))
    return shares
