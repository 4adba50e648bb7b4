"""The questions asked about mosaics and their answers, in equal numbers for every answer.

Cases of several mosaics: what is asked about all of them together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.envs.boxes import boxes_text
from frugalpath.envs.case import Case
from frugalpath.envs.mosaic_files import Mosaic
from frugalpath.envs.mosaic_layout import MAX_REGIONS, QUADRANTS, Layout

QUESTIONS = ("diagnosis", "presence", "count", "quadrant", "boxes")
COUNTS = tuple(str(n) for n in range(MAX_REGIONS + 1))
NO_QUADRANT = "none"


def ask(question: str, layouts: Sequence[Layout], seed: Sequence[int]) -> list[int]:
    """Which mosaics to ask a question of, so that each answer (number of boxes) is right equally often; in order."""
    return even([_answer_class(question, layout) for layout in layouts], (*seed, QUESTIONS.index(question)))


def even(answers: Sequence[str | None], seed: Sequence[int]) -> list[int]:
    """As many places of each answer, drawn at random, in order; none where all answers are one. None is no answer."""
    by_answer: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        if answer is not None:
            by_answer[answer].append(i)
    if len(by_answer) < 2:
        return []
    rng = np.random.default_rng(list(seed))
    n = min(len(rows) for rows in by_answer.values())
    return sorted(row for rows in by_answer.values() for row in rng.permutation(rows)[:n].tolist())


def prompt_of(question: str, view: str, lesion: str) -> str:
    """Text of a question; `view` is `field` or `slide`, `lesion` the word for what is looked for."""
    return {
        "diagnosis": f"Which tissue makes up most of this {view}?",
        "presence": f"Does this {view} show any {lesion}?",
        "count": f"How many separate regions of {lesion} does this {view} show?",
        "quadrant": f"In which quadrant of this {view} is the centre of the region of {lesion}?",
        "boxes": f"Give a box [x1, y1, x2, y2] in 0..1000 for each region of {lesion} in this {view}.",
    }[question]


def options_of(question: str, tissues: Sequence[str]) -> tuple[str, ...] | None:
    """Options of a question; `tissues` are the names of all classes. None for boxes."""
    return {
        "diagnosis": tuple(tissues),
        "presence": ("yes", "no"),
        "count": COUNTS,
        "quadrant": (*QUADRANTS, NO_QUADRANT),
        "boxes": None,
    }[question]


def answer_of(question: str, layout: Layout, margin: int) -> str:
    """Gold answer; only for mosaics that `ask` chose."""
    if question == "boxes":
        return boxes_text(layout.boxes(margin))
    answer = _answer_class(question, layout)
    if answer is None:
        raise ValueError(f"{question!r} is not asked of a {layout.kind} mosaic")
    return answer


def _answer_class(question: str, layout: Layout) -> str | None:
    """The answer, for boxes their number; None where the question has no clear answer."""
    if question == "diagnosis":
        return layout.lesion_label if layout.kind == "diffuse" else layout.background
    if question == "presence":
        return "no" if layout.kind == "none" else "yes"
    if layout.kind == "diffuse":
        return None
    if question == "quadrant":
        return NO_QUADRANT if layout.kind == "none" else layout.quadrant
    return str(len(layout.regions))


CASE_QUESTIONS = ("case_presence", "which_slide", "lesion_slides")


def several_cases(
    plan: Sequence[Mosaic],
    files: Sequence[Path],
    asked: Mapping[str, set[int]],
    record: Mapping[str, Any],
    mark: str,
    lesion: str,
) -> list[Case]:
    """Cases of `record["slides_per_case"]` mosaics each, of all splits.

    Args:
        plan: the mosaics, case after case.
        files: where each is written.
        asked: by question the first mosaics of the cases that it is asked of.
        record: parameters of the mosaics.
        mark: begins the ids.
        lesion: the word for what is looked for.
    """
    view, size = record["kind"], record["slides_per_case"]
    cases = []
    for first in range(0, len(plan), size):
        layouts = [mosaic.layout for mosaic in plan[first : first + size]]
        split, number = plan[first].split, plan[first].number // size
        name = f"{mark}-{split}-{size}x{number:05d}"
        extra = {
            "mosaic": ", ".join(layout.kind for layout in layouts),
            "regions": sum(len(layout.regions) for layout in layouts),
            "area": round(sum(layout.area for layout in layouts) / size, 4),
        }
        if record["mpp"] is not None:
            extra["mpp"] = record["mpp"]
        shown = tuple(map(str, files[first : first + size]))
        for question in (question for question, rows in asked.items() if first in rows):
            answer = case_answer(question, layouts, view)
            if answer is None:
                raise ValueError(f"{question!r} is not asked of {extra['mosaic']}")
            cases.append(
                Case(
                    id=f"{name}-{question}",
                    patient=name,
                    task="choice",
                    prompt=case_prompt(question, view, lesion),
                    answer=answer,
                    images=shown if view == "field" else (),
                    slides=shown if view == "slide" else (),
                    options=case_options(question, size, view),
                    split=split,
                    question=question,
                    extra=extra,
                )
            )
    return cases


def ask_cases(question: str, cases: Sequence[Sequence[Layout]], view: str, seed: Sequence[int]) -> list[int]:
    """Which cases to ask a question of, so that each answer is right equally often; in order."""
    return even([case_answer(question, case, view) for case in cases], (*seed, CASE_QUESTIONS.index(question)))


def case_prompt(question: str, view: str, lesion: str) -> str:
    """Text of a question; `view` is `field` or `slide`, `lesion` the word for what is looked for."""
    return {
        "case_presence": f"Does any of these {view}s show {lesion}?",
        "which_slide": f"Which of these {view}s shows {lesion}?",
        "lesion_slides": f"How many of these {view}s show {lesion}?",
    }[question]


def case_options(question: str, size: int, view: str) -> tuple[str, ...]:
    """Options of a question about `size` mosaics."""
    return {
        "case_presence": ("yes", "no"),
        "which_slide": tuple(f"{view} {i + 1}" for i in range(size)),
        "lesion_slides": tuple(str(i) for i in range(size + 1)),
    }[question]


def case_answer(question: str, case: Sequence[Layout], view: str) -> str | None:
    """Gold answer; None where a question does not arise."""
    places = [i for i, layout in enumerate(case) if layout.kind != "none"]
    if question == "case_presence":
        return "yes" if places else "no"
    if question == "which_slide":
        return f"{view} {places[0] + 1}" if len(places) == 1 else None
    return str(len(places))
