"""Reading a completion: its text, the parts of its form, and the one answer it gives.

The form is `<think>...</think><answer>...</answer>` (BiRR4CPath's system prompt). All work is a handful of substring
searches, so that the time is linear in the length of the text whatever a policy writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

# TRL hands a reward either plain text or a list of messages, one list a completion.
Completion: TypeAlias = str | list[dict[str, object]]

# Built-in rewards of how an answer is written, which do not say whether it is right.
SHAPING = frozenset({"format", "length", "overlong", "repetition"})

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


class Form(NamedTuple):
    """Which parts of the required form a completion has; all four together are the strict form."""

    thinks_first: bool  # starts with <think>, one pair, closed
    one_answer: bool  # one <answer>..</answer> pair that is not empty and lies outside the thinking
    adjacent: bool  # nothing but white space between </think> and <answer>
    ends_with_answer: bool  # nothing at all after </answer>, not even white space

    @property
    def strict(self) -> bool:
        """Whether the completion has the whole form."""
        return all(self)


def completion_text(completion: object) -> str:
    """Text of one completion: a string, or the last assistant message of a conversation.

    Content given as blocks (`[{"type": "text", "text": ...}]`) is joined. What holds no text, such as a tool call or
    an empty list of messages, is the empty string.
    """
    if isinstance(completion, list):
        messages = [m for m in completion if isinstance(m, Mapping) and m.get("role", "assistant") == "assistant"]
        completion = messages[-1].get("content") if messages else ""
        if isinstance(completion, list):
            texts = [block.get("text") for block in completion if isinstance(block, Mapping)]
            completion = "".join(text for text in texts if isinstance(text, str))
    return completion if isinstance(completion, str) else ""


def extract_answer(completion: object) -> str | None:
    """The text inside the one `<answer>..</answer>` block, stripped; None when the completion gives no answer.

    No answer: no block, several opening or closing tags (an echo of the prompt, a second guess), a block that is not
    closed, is empty, or lies inside thinking or before its end. Thinking may be absent, and text outside the block is
    ignored: the `format` reward asks for the strict form. A lone `</think>` is accepted, because some chat templates
    write `<think>` at the end of the prompt.
    """
    text = completion_text(completion)
    span = _answer_span(text)
    return text[span[0] : span[1]].strip() if span else None


def form_of(completion: object) -> Form:
    """Which parts of the form `<think>..</think>`, optional white space, `<answer>..</answer>` a completion has."""
    text = completion_text(completion)
    thinks_first = text.startswith(THINK) and text.count(THINK) == 1 and text.count(END_THINK) == 1
    span = _answer_span(text)
    if span is None:
        return Form(thinks_first, False, False, False)
    between = text[text.find(END_THINK) + len(END_THINK) : span[0] - len(ANSWER)]
    adjacent = thinks_first and not between.strip()
    return Form(thinks_first, True, adjacent, span[1] + len(END_ANSWER) == len(text))


def _answer_span(text: str) -> tuple[int, int] | None:
    """Start and end of the text inside the answer block; None as `extract_answer` says."""
    if text.count(ANSWER) != 1 or text.count(END_ANSWER) != 1 or text.count(THINK) > 1 or text.count(END_THINK) > 1:
        return None
    opening, end = text.find(ANSWER), text.find(END_ANSWER)
    start = opening + len(ANSWER)
    think, end_think = text.find(THINK), text.find(END_THINK)
    if end < start or end_think > opening or think > end_think:
        return None
    return (start, end) if text[start:end].strip() else None
