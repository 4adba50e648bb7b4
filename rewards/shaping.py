"""`length`, `overlong`, `repetition`: rewards for the length and repetition of a completion, not its content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from frugalpath.errors import InputError
from frugalpath.rewards.answer import Completion, completion_text, extract_answer
from frugalpath.rewards.registry import reward

MAX_TOKENS, MAX_NGRAM = 32_768, 20  # what bounds the time; no completion of a policy is longer


@reward("length")
def length(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]] | None = None,
    limit: int = 256,
    unit: str = "words",
    **columns: Any,
) -> list[float]:
    """1.0 for a completion of up to `limit` words or tokens, falling to 0.0 at twice as many; 0.0 without an answer.

    Thinking and answer count together. Silence would be the shortest completion, which is why it earns nothing.

    Args:
        completions: n completions, of any task.
        completion_ids: their tokens, as TRL gives them; needed for `unit: tokens`.
        limit: 1 or more.
        unit: `words` (between white space) or `tokens`.
        columns: not used.

    Returns:
        n values in 0..1.

    Example:
        >>> length(["<think>Round glands.</think> <answer>benign</answer>"], limit=2)
        [0.5]
    """
    problems = []
    if limit < 1:
        problems.append(f"reward 'length': `limit` is {limit}; give 1 or more")
    if unit not in ("words", "tokens"):
        problems.append(f"reward 'length': `unit` is {unit!r}; use words or tokens")
    elif unit == "tokens" and completion_ids is None:
        problems.append("reward 'length': there are no `completion_ids` here, so use `unit: words`")
    if problems:
        raise InputError(problems)
    most = 2 * limit  # more are not counted, so that a flood of text is cheap
    if unit == "tokens" and completion_ids is not None:
        counts = [len(ids) for ids in completion_ids]
    else:
        counts = [len(completion_text(completion).split(maxsplit=most)) for completion in completions]
    return [
        min(1.0, max(0.0, 2.0 - count / limit)) if extract_answer(completion) is not None else 0.0
        for completion, count in zip(completions, counts, strict=True)
    ]


@reward("overlong")
def overlong(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    max_length: int,
    buffer: int,
    **columns: Any,
) -> list[float]:
    """DAPO's soft punishment of overlong completions, as TRL computes it.

    0 up to `max_length - buffer` tokens, from there falling linearly to -1 at `max_length`, and -1 beyond.

    Args:
        completions: n completions, of any task.
        completion_ids: their tokens, as TRL gives them.
        max_length: tokens, usually `max_completion_length`.
        buffer: tokens, 1..max_length; DAPO used 4,096 of 20,480.
        columns: not used.

    Returns:
        n values in -1..0.
    """
    if not 0 < buffer <= max_length:
        raise InputError(f"reward 'overlong': `buffer` is {buffer}; give 1 to `max_length`, which is {max_length}")
    return get_soft_overlong_punishment(max_length, buffer)(completion_ids)


@reward("repetition")
def repetition(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    ngram: int = 3,
    max_penalty: float = 1.0,
    **columns: Any,
) -> list[float]:
    """Penalty for repeated n-grams of tokens, -max_penalty * (1 - different / all), as TRL computes it.

    Args:
        completions: n completions, of any task.
        completion_ids: their tokens, as TRL gives them; those after the first 32,768 are not looked at.
        ngram: tokens of an n-gram, 1 to 20; a completion of fewer has no penalty.
        max_penalty: what a completion that says one thing all the time comes near to, 0 or more.
        columns: not used.

    Returns:
        n values in -max_penalty..0.
    """
    problems = []
    if not 1 <= ngram <= MAX_NGRAM:
        problems.append(f"reward 'repetition': `ngram` is {ngram}; give 1 to {MAX_NGRAM}")
    if max_penalty < 0:
        problems.append(f"reward 'repetition': `max_penalty` is {max_penalty}; it is subtracted, so give 0 or more")
    if problems:
        raise InputError(problems)
    return get_repetition_penalty_reward(ngram, -max_penalty)([ids[:MAX_TOKENS] for ids in completion_ids])
