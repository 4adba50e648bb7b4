"""A reward that tells apart what an untrained performer writes."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from frugalpath.rewards.registry import gold_completion


def likeness(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """How much of the gold completion a completion has, letter by letter."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    gold = [gold_completion({"answer": a}) for a in answer]
    return [SequenceMatcher(None, t, g).ratio() for t, g in zip(texts, gold, strict=True)]
