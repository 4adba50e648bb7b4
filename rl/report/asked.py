"""The questions that a run was trained on: what it can be asked, for its card and for those who ask it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from envs.case import Case
from rewards.label import normalise

SHARED = 5
"""Patients of whom a question must be asked to be told; others may be about a single case."""
MOST = 12
"""Questions that are told."""


def asked_of(cases: Sequence[Case]) -> dict[str, Any]:
    """Questions that cases of several patients share.

    Returns:
        `questions`: the commonest, each with `prompt`, `options` (None if free), `task` and `source` (image or slide).
        `all`: whether they are all that was asked.
    """
    patients: dict[tuple[Any, ...], set[str]] = {}
    for case in cases:
        key = (case.prompt, case.options, case.task, "image" if case.images else "slide")
        patients.setdefault(key, set()).add(case.patient)
    shared = [key for key, who in patients.items() if len(who) >= SHARED]
    kept = sorted(shared, key=lambda key: -len(patients[key]))[:MOST]
    names = ("prompt", "options", "task", "source")
    return {"all": len(kept) == len(patients), "questions": [dict(zip(names, key, strict=True)) for key in kept]}


def example(summary: Mapping[str, Any]) -> str:
    """Arguments of rl/answer.py that ask the run's commonest question."""
    known = (summary.get("asked") or {}).get("questions")
    if not known:
        return '--image field.png --question "..."'
    first = known[0]
    words = ["--question", " ".join(first["prompt"].split())]
    if first["options"]:
        words += ["--options", *first["options"]]
    return f"--{'image field.png' if first['source'] == 'image' else 'slide a.svs'} {shlex.join(words)}"


def foreign(case: Case, summary: Mapping[str, Any]) -> str | None:
    """What is said of a question that is none of the run's own; None where it is one, or the run's differ by case."""
    asked = summary.get("asked") or {}
    if not asked.get("all"):
        return None
    told = "; ".join(_named(row["prompt"], row["options"]) for row in asked["questions"])
    same = [row for row in asked["questions"] if normalise(row["prompt"]) == normalise(case.prompt)]
    if not same:
        return f"the run was never asked {case.prompt!r}; its own questions are {told}"
    if case.options and not any(_set(row["options"]) == _set(case.options) for row in same):
        return f"the run never had the options {', '.join(case.options)}; its own questions are {told}"
    return None


def _named(prompt: str, options: Sequence[str] | None) -> str:
    return repr(prompt) + (f" ({', '.join(options)})" if options else "")


def _set(options: Sequence[str] | None) -> set[str]:
    return {normalise(option) for option in options or ()}
