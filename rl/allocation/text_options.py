"""The `allocator.text` part of a recipe: the form that writes a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rewards.objectives import INSTEAD, REMOVED
from slides.errors import removed

PRESETS = ("birr", "linear")
"""Presets that need to know of no other budget of the case."""


@dataclass
class TextOptions:
    """How the adapter that writes a budget looks and learns.

    Args:
        look: tokens that it is shown; null is the published cap of 256, or the largest budget where that is less.
        preset: what a budget is worth, see `rewards.objectives`; `linear` is at `allocator.price`.
        format_weight: of the reward for the form of the completion.
        lora: keys of peft's `LoraConfig`.
        warm_start: keys of `SFTConfig`; budgets drawn uniformly from the ladder are taught first. Null teaches none.
        grpo: GRPO arguments that differ from the recipe's own.
    """

    look: int | None = None
    preset: str = "birr"
    format_weight: float = 1.0
    lora: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, Any] | None = None
    grpo: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What is wrong with it, one line each."""
        found = []
        if self.preset in REMOVED:
            found.append(removed(f"allocator.text.preset: {self.preset}", f"{INSTEAD} linear; write linear or birr"))
        elif self.preset not in PRESETS:
            found.append(f"allocator.text.preset: {self.preset!r} is not known; known are {', '.join(PRESETS)}")
        if self.look is not None and self.look < 1:
            found.append(f"allocator.text.look: {self.look} tokens; it is shown at least 1")
        return found
