"""What is asked about a simulated slide: kinds of question, their options, and the answer that follows from its truth.

A truth here is `Truth.as_dict()`, as it is stored in `truth.jsonl`.

Cases of several simulated slides: which slides share a case, and what is asked about all of them together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frugalpath.envs.boxes import boxes_text
from frugalpath.envs.case import SPLITS
from frugalpath.envs.simulator_folder import SlideSpec
from frugalpath.envs.specimen import DIAGNOSES, MITOSES_CUT, QUADRANTS, close_cut, size_cuts

QUESTIONS = ("diagnosis", "grade", "necrosis", "size", "margin", "quadrant", "boxes", "mitoses", "synoptic", "report")
PROTOCOL = "simulator"  # of the answers to `synoptic`
STEP = 20  # of box coordinates, in thousandths of the slide: a tenth of a small focus


@dataclass(frozen=True)
class Asked:
    """A question as it is put, its options (None for all but choices), its answer and its task."""

    prompt: str
    options: tuple[str, ...] | None
    answer: str
    task: str = "choice"


def ask(kind: str, truth: Mapping[str, Any], size_mm: float) -> Asked | None:
    """The question of a kind about a slide, or None where it does not arise (the grade of an adenoma).

    Args:
        kind: one of `QUESTIONS`.
        truth: of the slide.
        size_mm: side of the slide, with which the cut-offs in millimetres scale.
    """
    cancer, lesion = truth["diagnosis"] == "carcinoma", truth["size_mm"] is not None
    low, high = size_cuts(size_mm)
    close = close_cut(size_mm)
    if kind == "diagnosis":
        return Asked("What is the diagnosis?", DIAGNOSES, truth["diagnosis"])
    if kind == "grade" and cancer:
        return Asked(
            "What is the grade of the carcinoma?", ("grade 1", "grade 2", "grade 3"), f"grade {truth['grade']}"
        )
    if kind == "necrosis" and cancer:
        return Asked("Is there tumour necrosis?", ("present", "absent"), "present" if truth["necrosis"] else "absent")
    if kind == "size" and lesion:
        options = (f"under {low:g} mm", f"{low:g} to {high:g} mm", f"over {high:g} mm")
        answer = options[(truth["size_mm"] >= low) + (truth["size_mm"] >= high)]
        return Asked("What is the greatest dimension of the largest focus of the lesion?", options, answer)
    if kind == "margin" and lesion:
        prompt = (
            "What is the status of the inked margins? "
            f"Involved: the lesion reaches ink. Close: it comes within {close:g} mm. Clear: it does not."
        )
        return Asked(prompt, ("involved", "close", "clear"), margin_status(truth, size_mm))
    if kind == "quadrant" and (truth["quadrant"] is not None or not lesion):
        return Asked(
            "Which quadrant of the slide holds most of the lesion?",
            (*QUADRANTS, "none"),
            truth["quadrant"] if lesion else "none",
        )
    if kind == "boxes":
        prompt = f"Give a box [x1, y1, x2, y2] in 0..1000, to the nearest {STEP}, for each focus of the lesion."
        return Asked(
            prompt, None, boxes_text([[STEP * round(v / STEP) for v in box] for box in truth["boxes"]]), "detection"
        )
    if kind == "mitoses" and cancer:
        prompt = f"Is the mitotic count of the tumour low or high? High: at least {MITOSES_CUT:g} per mm2."
        return Asked(prompt, ("low", "high"), "high" if truth["mitoses_per_mm2"] >= MITOSES_CUT else "low")
    if kind == "synoptic" and (truth["quadrant"] is not None or not lesion):
        return Asked("Write the synoptic report of this slide.", None, report_text(truth, size_mm), "synoptic")
    if kind == "report" and (truth["quadrant"] is not None or not lesion):
        return Asked("Describe the findings of this slide in one sentence.", None, report_sentence(truth), "open")
    return None


def report_text(truth: Mapping[str, Any], size_mm: float) -> str:
    """The report of a slide in the lines of the protocol `simulator`; fields that do not apply have no line."""
    known = synoptic(truth, size_mm)
    names = ("diagnosis", "grade", "necrosis", "quadrant", "margin_status")
    lines = [f"{name.partition('_')[0].capitalize()}: {known[name]}" for name in names if known[name] is not None]
    return "\n".join(lines)


def report_sentence(truth: Mapping[str, Any]) -> str:
    """The findings as dictated, always in the same words; a lesion needs a clear quadrant."""
    parts = [truth["diagnosis"].capitalize()]
    if truth["diagnosis"] == "carcinoma":
        parts.append(f"grade {truth['grade']}")
    if truth["size_mm"] is not None:
        parts.append(f"mostly in the {truth['quadrant']} quadrant")
    if truth["diagnosis"] == "carcinoma":
        parts.append(f"{'with' if truth['necrosis'] else 'without'} necrosis")
    return ", ".join(parts) + "."


def margin_status(truth: Mapping[str, Any], size_mm: float) -> str:
    """Margin class of a lesion: `involved`, `close` or `clear`."""
    if truth["margin_mm"] == 0:
        return "involved"
    return "close" if truth["margin_mm"] < close_cut(size_mm) else "clear"


def synoptic(truth: Mapping[str, Any], size_mm: float) -> dict[str, Any]:
    """All that is known about a slide as the fields of a synoptic report; None where a field does not apply."""
    lesion, cancer = truth["size_mm"] is not None, truth["diagnosis"] == "carcinoma"
    return {
        "diagnosis": truth["diagnosis"],
        "grade": truth["grade"],
        "tumour_size_mm": truth["size_mm"],
        "tumour_foci": truth["foci"],
        "tumour_area_mm2": truth["area_mm2"],
        "quadrant": truth["quadrant"],
        "margin_status": margin_status(truth, size_mm) if lesion else None,
        "margin_distance_mm": truth["margin_mm"],
        "necrosis": ("present" if truth["necrosis"] else "absent") if cancer else None,
        "mitotic_count": truth["mitoses"] if cancer else None,
        "mitoses_per_mm2": truth["mitoses_per_mm2"],
    }


CASE_QUESTIONS = ("case_diagnosis", "case_grade", "which_slide", "carcinoma_slides", "case_synoptic")
# What cases hold, ten in turn: no lesion, adenomas without carcinoma, carcinoma on one slide or on several. No answer
# is right in more than six of ten, and in four one slide alone decides.
TURNS = ("one", "adenoma", "one", "several", "normal", "one", "adenoma", "several", "one", "normal")


@dataclass(frozen=True)
class Unit:
    """What questions are asked about: one slide, or the slides of a case in their order (places in the cohort)."""

    name: str
    patient: str
    split: str
    slides: tuple[int, ...]


def single_slides(specs: Sequence[SlideSpec], splits: Sequence[str]) -> list[Unit]:
    """Every slide by itself."""
    return [
        Unit(spec.name, spec.patient, split, (i,)) for i, (spec, split) in enumerate(zip(specs, splits, strict=True))
    ]


def compose_cases(specs: Sequence[SlideSpec], splits: Sequence[str], size: int, seed: int) -> list[Unit]:
    """As many cases of `size` slides as there are slides for in the shares of `TURNS`; each is its own patient.

    A slide is in one case at most and keeps the split that it has by itself, so that a model trained on single slides
    has seen none of the test cases. The only carcinoma of a case lies at every place equally often, grades are even.
    """
    units = []
    for number, split in enumerate(SPLITS):
        pools: dict[str | int, list[int]] = {"normal": [], "adenoma": [], 1: [], 2: [], 3: []}
        for i, spec in enumerate(specs):
            if splits[i] == split:
                pools[spec.grade or spec.diagnosis].append(i)
        most = sum(map(len, pools.values())) // size
        tries = (_seat(n, pools, size, np.random.default_rng([seed, number, size, 5])) for n in range(most, 0, -1))
        cases: list[list[int]] = next((found for found in tries if found is not None), [])
        for i, case in enumerate(cases):
            name = f"{split}-{size}x{i:05d}"
            units.append(Unit(name, name, split, tuple(case)))
    return units


def _seat(
    n: int, pools: Mapping[str | int, Sequence[int]], size: int, rng: np.random.Generator
) -> list[list[int]] | None:
    """Slides of `n` cases, or None where the pools do not hold enough of some kind."""
    left = {kind: [pool[i] for i in rng.permutation(len(pool))] for kind, pool in pools.items()}
    turns = list(itertools.islice(itertools.cycle(TURNS), n))
    single, several = itertools.count(), itertools.count()
    cases: list[list[int]] = []
    alone: list[int | None] = []  # place of the only carcinoma
    for turn in turns:
        place = None
        if turn == "one":
            at = next(single)
            wanted: list[str | int] = [1 + at % 3]
            place = (at + at // math.lcm(3, size)) % size  # every grade at every place
        elif turn == "several":
            at = next(several)
            top = 1 + at // (size - 1) % 3
            wanted = [top, *rng.integers(1, top + 1, 1 + at % (size - 1)).tolist()]
        else:
            wanted = [turn] * (size if turn == "normal" else 1)
        if any(len(left[kind]) < wanted.count(kind) for kind in wanted):
            return None
        cases.append([left[kind].pop() for kind in wanted])
        alone.append(place)
    others = [*left["normal"], *left["adenoma"]]
    if sum(size - len(case) for case in cases) > len(others):
        return None
    rest = iter(others[i] for i in rng.permutation(len(others)))
    seated = []
    for case, place in zip(cases, alone, strict=True):
        full = [*case, *itertools.islice(rest, size - len(case))]
        if place is None:
            full = [full[i] for i in rng.permutation(size)]
        else:
            full = [*full[1 : place + 1], full[0], *full[place + 1 :]]
        seated.append(full)
    return seated


def ask_case(kind: str, truths: Sequence[Mapping[str, Any]], size_mm: float) -> Asked | None:
    """The question of a kind about the slides of a case, or None where it does not arise.

    Args:
        kind: one of `CASE_QUESTIONS`.
        truths: of the slides, in their order.
        size_mm: side of a slide.
    """
    ranks = [(DIAGNOSES.index(truth["diagnosis"]), truth["grade"] or 0) for truth in truths]
    worst = truths[ranks.index(max(ranks))]
    cancers = [i for i, truth in enumerate(truths) if truth["diagnosis"] == "carcinoma"]
    if kind == "case_diagnosis":
        return Asked("What is the most serious diagnosis among the slides?", DIAGNOSES, worst["diagnosis"])
    if kind == "case_grade" and cancers:
        grades = ("grade 1", "grade 2", "grade 3")
        return Asked("What is the highest grade of carcinoma among the slides?", grades, f"grade {worst['grade']}")
    if kind == "which_slide" and len(cancers) == 1:
        slides = tuple(f"slide {i + 1}" for i in range(len(truths)))
        return Asked("Which slide shows carcinoma?", slides, slides[cancers[0]])
    if kind == "carcinoma_slides":
        counts = tuple(str(i) for i in range(len(truths) + 1))
        return Asked("How many of the slides show carcinoma?", counts, counts[len(cancers)])
    if kind == "case_synoptic" and ranks.count(max(ranks)) == 1 and worst["quadrant"] is not None:
        prompt = (
            "Write the synoptic report of the slide with the most serious diagnosis, by grade where two are alike."
        )
        return Asked(prompt, None, report_text(worst, size_mm), "synoptic")
    return None
