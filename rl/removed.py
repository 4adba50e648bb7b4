"""Keys of a recipe's `allocator` that were removed: at what used to be their default they are passed over."""

from __future__ import annotations

import logging
from typing import Any

from slides.errors import removed

logger = logging.getLogger(__name__)

FORMER: dict[str, Any] = {"share": "equal", "look_state": None, "look_confidence": None}
"""Removed keys with their former defaults, which are still a part of what a finished stage is known by."""

PROBE = (
    "what the performer says at a small budget cost about what it brought the network; take the key out, or set "
    "allocator.form to escalate, which goes by the performer's own answers"
)
REASONS = {
    "share": "shares by attention and a budget for each slide were no better than even shares at equal cost; take the "
    "key out, and the slides of a case share its budget evenly",
    "look_state": PROBE,
    "look_confidence": PROBE,
}
"""What was measured of them, and what to do instead."""

IDLE = ("fit_splits",)
"""Keys that only went with a removed one."""


def without_removed(allocator: Any, problems: list[str]) -> Any:
    """The `allocator` part without removed keys; a warning tells of those that are as they were by default.

    Args:
        allocator: as the recipe has it; what is no mapping is left to whoever checks it.
        problems: takes a line for every removed key with another value.
    """
    if not isinstance(allocator, dict):
        return allocator
    for key, value in allocator.items():
        if key in IDLE or (key in FORMER and value == FORMER[key]):
            logger.warning("allocator.%s has no effect any more; leave it out", key)
        elif key in FORMER:
            problems.append(removed(f"allocator.{key}: {value!r}", REASONS[key]))
    return {key: value for key, value in allocator.items() if key not in (*FORMER, *IDLE)}
