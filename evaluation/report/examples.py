"""Questions that a run was trained on, and single cases for the report: those that gained or lost most."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from frugalpath.envs.case import Case
from frugalpath.rewards.answer import extract_answer
from frugalpath.rewards.label import normalise

SHARED = 5
"""Minimum number of patients of a listed question; others may identify a single case."""
MOST = 12
"""Maximum number of listed questions."""


def question_examples(cases: Sequence[Case]) -> dict[str, Any]:
    """List the questions shared by cases of several patients.

    Returns:
        `questions`: the commonest, each with `prompt`, `options` (None if free), `task` and `source` (image or slide).
        `all`: whether the list is complete.
    """
    patients: dict[tuple[Any, ...], set[str]] = {}
    for case in cases:
        key = (case.prompt, case.options, case.task, "image" if case.images else "slide")
        patients.setdefault(key, set()).add(case.patient)
    shared = [key for key, who in patients.items() if len(who) >= SHARED]
    kept = sorted(shared, key=lambda key: -len(patients[key]))[:MOST]
    names = ("prompt", "options", "task", "source")
    return {"all": len(kept) == len(patients), "questions": [dict(zip(names, key, strict=True)) for key in kept]}


def example_arguments(summary: Mapping[str, Any]) -> str:
    """Arguments of `frugalpath answer` that ask the run's commonest question."""
    known = (summary.get("asked") or {}).get("questions")
    if not known:
        return '--image field.png --question "..."'
    first = known[0]
    words = ["--question", " ".join(first["prompt"].split())]
    if first["options"]:
        words += ["--options", *first["options"]]
    return f"--{'image field.png' if first['source'] == 'image' else 'slide a.svs'} {shlex.join(words)}"


def foreign(case: Case, summary: Mapping[str, Any]) -> str | None:
    """Warn of a question or options that the run was not trained on; None if it was, or if its questions vary."""
    asked = summary.get("asked") or {}
    if not asked.get("all"):
        return None
    told = "; ".join(_named(row["prompt"], row["options"]) for row in asked["questions"])
    same = [row for row in asked["questions"] if normalise(row["prompt"]) == normalise(case.prompt)]
    if not same:
        return f"the run was not trained on the question {case.prompt!r}, only on {told}"
    if case.options and not any(_set(row["options"]) == _set(case.options) for row in same):
        return f"the run was not trained on the options {', '.join(case.options)}, only on {told}"
    return None


def _named(prompt: str, options: Sequence[str] | None) -> str:
    return repr(prompt) + (f" ({', '.join(options)})" if options else "")


def _set(options: Sequence[str] | None) -> set[str]:
    return {normalise(option) for option in options or ()}


Row = dict[str, Any]

CLASSES = 12
"""Maximum number of answers listed per kind of question; with more, they are not split."""
OPEN = "open answer, not shown"
"""Placeholder for the text of open answers and reports, which may name people."""


def rung_of(row: Row) -> int:
    """Budget of the ladder nearest to the one that a case was answered at."""
    return row["rung"] if "rung" in row else row["budget"]


def ladder_of(rows: Sequence[Row]) -> list[int]:
    """Budgets above 0 of the cases' answers, ascending."""
    return sorted({int(b) for row in rows for b in row["score_by_budget"]} - {0})


def answers_of(row: Row) -> tuple[str, str]:
    """Gold answer and the performer's answer, in a form that may be shown."""
    if row.get("task") not in ("choice", "detection"):
        return OPEN, OPEN
    return row["answer"], extract_answer(row["completion"]) or "no answer"


def spread(rows: Sequence[Row], ladder: Sequence[int]) -> list[Row]:
    """Distribution of budgets: a row for all cases, each task, each kind of question and each of its answers.

    Returns:
        rows of `name`, `level` (0 all, 1 task, 2 question, 3 answer), `n`, `tokens`, `accuracy`, and `shares` of the
        cases at each budget of the ladder. A task is left out where it is the only one, or has one kind of question.
    """
    made = [_group("all cases", 0, rows, ladder)]
    tasks = _by(rows, lambda row: row.get("task", ""))
    for task, of_task in tasks.items():
        questions = _by(of_task, lambda row: row["question"])
        if len(tasks) > 1 and len(questions) > 1:
            made.append(_group(task or "other", 1, of_task, ladder))
        for question, of_question in questions.items():
            made.append(_group(question, 2, of_question, ladder))
            classes = _by(of_question, lambda row: row["answer"])
            if of_question[0].get("task") == "choice" and 1 < len(classes) <= CLASSES:
                made += [_group(name, 3, of_class, ladder) for name, of_class in classes.items()]
    return made


def helps(rows: Sequence[Row], ladder: Sequence[int]) -> list[Row]:
    """Mean score at every budget, for the cases of each chosen budget."""
    made = []
    for budget in ladder:
        own = [row for row in rows if rung_of(row) == budget]
        if own:
            at = {b: float(np.mean([row["score_by_budget"][str(b)] for row in own])) for b in ladder}
            made.append({"budget": budget, "n": len(own), "at": at, "gain": at[ladder[-1]] - at[ladder[0]]})
    return made


def gains(rows: Sequence[Row], ladder: Sequence[int], static: int, most: int) -> list[Row]:
    """Cases that gained most: correct where the largest or best static budget is wrong, then those that saved most.

    Args:
        static: the best static budget. most: so many cases, of every kind of question in turn.
    """

    def key(row: Row) -> tuple:
        score = row["score_by_budget"]
        rival = min(score[str(ladder[-1])], score[str(static)])
        return row["score"] - rival, -row["tokens"], -row["flops"]

    found = [row for row in rows if row["score"] >= 0.5 and row["budget"] < ladder[-1]]
    return _in_turn(found, key, most)


def mistakes(rows: Sequence[Row], ladder: Sequence[int], most: int) -> list[Row]:
    """Worst mistakes: low score at the chosen budget, high at another, highest predicted score first."""

    def regret(row: Row) -> float:
        return max(row["score_by_budget"][str(b)] for b in ladder) - row["score"]

    def key(row: Row) -> tuple:
        return regret(row), (row.get("predicted") or {}).get(str(rung_of(row)), 0.0)

    return _in_turn([row for row in rows if regret(row) >= 0.5], key, most)


def _in_turn(rows: Sequence[Row], key: Callable[[Row], tuple], most: int) -> list[Row]:
    """Interleave the kinds of question, so that no kind fills the page."""
    groups = [sorted(group, key=key, reverse=True)[:most] for group in _by(rows, lambda r: r["question"]).values()]
    groups.sort(key=lambda group: key(group[0]), reverse=True)
    return [row for rank in zip_longest(*groups) for row in rank if row is not None][:most]


def _by(rows: Sequence[Row], of: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[of(row)].append(row)
    return dict(sorted(groups.items()))


def _group(name: str, level: int, rows: Sequence[Row], ladder: Sequence[int]) -> Row:
    count = Counter(map(rung_of, rows))
    return {
        "name": name,
        "level": level,
        "n": len(rows),
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "accuracy": float(np.mean([row["score"] for row in rows])),
        "shares": [count[b] / len(rows) for b in ladder],
    }
