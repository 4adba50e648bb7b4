"""The questions asked about mosaics and their answers, in equal numbers for every answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from envs.boxes import boxes_text
from envs.mosaic_layout import MAX_REGIONS, QUADRANTS, Layout

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
