"""Rows in the style of ms-swift: `messages` and `images`, the gold answer in `solution` or the assistant's turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from frugalpath.errors import InputError

_IMAGE = "<image>"


def swift_row(
    values: Mapping[str, Any], *, task: str | None, options: Sequence[str] | None, gold: bool = True
) -> dict[str, Any]:
    """Columns of a case out of an ms-swift row.

    `<image>` placeholders are taken out of the prompt. The gold answer is what stands in `<answer>..</answer>` of
    `solution`, else of the assistant's turn; without tags it is the whole text. `<think>..</think>` of the assistant
    becomes the column `rationale`, a system turn the column `system`. For a `choice` with options, `(B) benign` and
    `B` mean the option.

    Args:
        gold: whether a row must have an answer.

    Raises:
        InputError: with everything that is wrong with the row.
    """
    row = {key: value for key, value in values.items() if key not in ("messages", "images", "solution") and value}
    problems: list[str] = []
    turns: dict[str, list[str]] = {"system": [], "user": [], "assistant": []}
    messages = values.get("messages")
    if not isinstance(messages, list):
        raise InputError("`messages` must be a list of {role, content}")
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        text = _content(message.get("content")) if isinstance(message, Mapping) else None
        if not isinstance(role, str) or role not in turns or text is None:
            problems.append("a message is not {role: system | user | assistant, content: text}")
        else:
            turns[role].append(text)
    if len(turns["user"]) != 1 or len(turns["assistant"]) > 1:
        problems.append("a case is one question: `messages` needs one user turn and at most one assistant turn")
    if problems:
        raise InputError(problems)

    images, found = _images(values.get("images"))
    problems += found
    prompt = turns["user"][0]
    placeholders = prompt.count(_IMAGE)
    if placeholders and images and placeholders != len(images):
        problems.append(f"{placeholders} {_IMAGE} in the prompt for {len(images)} images; write one for each or none")
    row["prompt"] = re.sub(rf"{_IMAGE}[ \t]*\n?", "", prompt).strip()
    if images:
        row["images"] = images
    if turns["system"]:
        row["system"] = "\n".join(turns["system"])
    reply = turns["assistant"][0] if turns["assistant"] else ""
    if rationale := _between(reply, "think"):
        row.setdefault("rationale", rationale)
    given = values.get("solution") or row.get("answer") or reply
    if isinstance(given, str) and given.strip():
        answer = _between(given, "answer")
        answer = given.strip() if answer is None else answer
        if row.get("task", task) == "choice" and (choices := row.get("options", options)):
            answer = _option(answer, choices)
        row["answer"] = answer
    elif gold:
        problems.append("no gold answer: give `solution`, or an assistant turn")
    if problems:
        raise InputError(problems)
    return row


def _content(content: Any) -> str | None:
    """Text of a message; content given as blocks is joined, an image block being its placeholder."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = []
    for block in content:
        if not isinstance(block, Mapping) or block.get("type") not in ("text", "image"):
            return None
        parts.append(_IMAGE if block["type"] == "image" else str(block.get("text") or ""))
    return "".join(parts)


def _images(entries: Any) -> tuple[list[str], list[str]]:
    paths, problems = [], []
    for entry in entries if isinstance(entries, list) else [entries] if entries else []:
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if isinstance(path, str) and path:
            paths.append(path)
        else:
            problems.append("an entry of `images` has no path; embedded images are not read, write them to files")
    return paths, problems


def _between(text: str, tag: str) -> str | None:
    match = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return match.group(1).strip() if match else None


def _option(answer: str, options: Sequence[str]) -> str:
    """The option that `(B) benign`, `B. benign`, `(B)` or `B` stands for; the answer itself where none does."""
    if answer in options:
        return answer
    match = re.fullmatch(r"\(?([A-Za-z])(?:[).:]\s*(.*))?", answer, re.DOTALL)
    if not match:
        return answer
    letter, text = ord(match.group(1).upper()) - ord("A"), (match.group(2) or "").strip()
    if text:
        # The words decide: the letters of a prompt may be in another order than the options.
        return text if text in options else answer
    return options[letter] if letter < len(options) else answer
