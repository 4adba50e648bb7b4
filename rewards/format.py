"""`format`: the completion has the form `<think>...</think><answer>...</answer>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from frugalpath.rewards.answer import Completion, form_of
from frugalpath.rewards.registry import reward


@reward("format")
def format_reward(completions: Sequence[Completion], soft: bool = False, **columns: Any) -> list[float]:
    """1.0 for the strict form, 0.0 otherwise; with `soft`, a quarter for each of its four parts.

    The strict form is the published one (`<think>` first and closed, optional white space, `<answer>..</answer>`,
    nothing at all after it), and more: each tag occurs once and the answer is not empty, so that repeating blocks or
    leaving them empty earns nothing.

    Args:
        completions: n completions, of any task.
        soft: give 0.25 each for a closed `<think>` block at the start; one answer block that is not empty; nothing but
            white space between the two; nothing after the answer. All four are the strict form.
        columns: not used.

    Returns:
        n values in 0..1.

    Example:
        >>> format_reward(["<think>Glands are round.</think><answer>benign</answer>", "benign"])
        [1.0, 0.0]
    """
    forms = [form_of(completion) for completion in completions]
    return [sum(form) / len(form) if soft else float(form.strict) for form in forms]
