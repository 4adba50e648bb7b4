"""Simulated slides: procedural H&E written as pyramidal TIFF, with questions whose answers are known from the drawing.

The embedded default where there is no data. Some questions are answered by one visual token (diagnosis, grade), some
need a few (necrosis, quadrant) and some a fine grid (size, margin, mitoses), so that an allocator has something to
learn. `python -m frugalpath.envs.simulator --folder slides --slides 20` writes a folder with a manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.envs.case import Case
from frugalpath.envs.simulator_cases import (
    CASE_QUESTIONS,
    PROTOCOL,
    QUESTIONS,
    Unit,
    ask,
    ask_case,
    compose_cases,
    single_slides,
    synoptic,
)
from frugalpath.envs.simulator_folder import SlideSpec, fill_folder
from frugalpath.envs.splits import assign_splits
from frugalpath.errors import InputError, entry
from frugalpath.files import write_text

# Shares of diagnoses and grades among patients, in 60 parts.
MIX: tuple[tuple[str, int | None], ...] = (
    *[("normal", None)] * 12,
    *[("adenoma", None)] * 15,
    *[("carcinoma", grade) for grade in (1, 2, 3)] * 11,
)

MIN_MM, MAX_MM = 0.4, 20.0
MIN_MPP, MAX_MPP = 0.2, 4.0


def build(
    *,
    folder: str,
    slides: int = 900,
    seed: int = 0,
    size_mm: float = 0.896,
    mpp: float = 1.0,
    questions: Sequence[str] | None = None,
    questions_per_slide: int | None = None,
    slides_per_case: int = 1,
    val_fraction: float = 0.1,
    test_fraction: float = 0.25,
    workers: int = 2,
) -> list[Case]:
    """Draw a folder of slides, or re-use it, and ask about each slide, or about cases of several slides.

    Every slide follows from `seed` and its number alone, so that more slides can be asked for later and the first ones
    stay as they are. An interrupted run is continued. Processes that build one folder at the same time wait for the
    first of them.

    Args:
        folder: where the slides lie or will lie: `slides/*.tif`, `truth.jsonl`, `params.json`.
        slides: how many; one or two belong to a patient.
        seed: another seed, other slides.
        size_mm: side of the square slide, 0.4 to 20. The shapes scale with it, cells keep their real size.
        mpp: micrometres per pixel of the base level, 0.2 to 4; further levels halve it.
        questions: kinds to ask (default all): diagnosis, grade, necrosis, size, margin, quadrant, boxes,
            mitoses, synoptic, report; of several slides case_diagnosis, case_grade, which_slide, carcinoma_slides,
            case_synoptic.
        questions_per_slide: at most so many a slide or case, drawn at random (default all that apply).
        slides_per_case: above 1, there are cases of so many slides, and the default is to ask about these alone. A
            slide keeps its split and is in one case at most; what is left over when cases are balanced is in none.
            Kinds about one slide that are named in `questions` are asked of every slide by itself.
        val_fraction, test_fraction: shares of the slides, split by patient and spread over the diagnoses.
        workers: processes that draw.

    Returns:
        Choice, detection, synoptic and open cases, one a question; `question` is its kind, `extra["truth"]` all known
        about the slide as JSON text, about several slides as a JSON list.

    Raises:
        InputError: a parameter is out of range, or the folder holds slides of other parameters or other files.
    """
    _check(
        slides,
        seed,
        size_mm,
        mpp,
        questions,
        questions_per_slide,
        slides_per_case,
        val_fraction,
        test_fraction,
        workers,
    )
    root = Path(os.path.abspath(os.path.expanduser(folder)))
    specs = cohort(slides, seed)
    strata = [f"{spec.diagnosis} {spec.grade}" for spec in specs]
    fractions = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    splits = assign_splits([spec.patient for spec in specs], strata, fractions, seed=seed)
    several = slides_per_case > 1
    kinds = questions or (CASE_QUESTIONS if several else QUESTIONS)
    units = compose_cases(specs, splits, slides_per_case, seed) if several else []
    if set(kinds) & set(QUESTIONS):
        units += single_slides(specs, splits)
    held = {unit.split for unit in units if len(unit.slides) == slides_per_case}
    empty = [name for name, share in fractions.items() if share > 0 and name not in held]
    if empty:
        raise InputError(
            f"{slides} slides leave the split {empty[0]!r} empty{' of whole cases' if several else ''}; "
            "ask for more slides or set its fraction to 0"
        )
    rows = fill_folder(root, specs, seed=seed, size_mm=size_mm, mpp=mpp, workers=workers)
    most = questions_per_slide if questions_per_slide is not None else len(kinds)
    drawn = [np.random.default_rng([seed, number, 2]) for number in range(len(units))]
    return [
        case
        for unit, rng in zip(units, drawn, strict=True)
        for case in _ask(unit, [rows[i] for i in unit.slides], kinds, most, size_mm, root, rng)
    ]


def _ask(
    unit: Unit,
    rows: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    most: int,
    size_mm: float,
    root: Path,
    rng: np.random.Generator,
) -> list[Case]:
    """The questions about one slide, or about the slides of one case.

    Args:
        unit: the slide or case. rows: what is known of its slides.
        most: questions that are asked, drawn at random where there are more.
    """
    truths = [row["truth"] for row in rows]
    together = len(truths) > 1
    found = [(kind, ask_case(kind, truths, size_mm) if together else ask(kind, truths[0], size_mm)) for kind in kinds]
    asked = [(kind, question) for kind, question in found if question is not None]
    if len(asked) > most:
        asked = [asked[i] for i in sorted(rng.permutation(len(asked))[:most])]
    known = [synoptic(truth, size_mm) for truth in truths]
    return [
        Case(
            id=f"{unit.name}-{kind}",
            patient=unit.patient,
            task=question.task,
            prompt=question.prompt,
            answer=question.answer,
            options=question.options,
            protocol=PROTOCOL if question.task == "synoptic" else None,
            slides=tuple(str(root / row["slide"]) for row in rows),
            split=unit.split,
            question=kind,
            extra={"truth": json.dumps(known if together else known[0])},
        )
        for kind, question in asked
    ]


def cohort(slides: int, seed: int) -> list[SlideSpec]:
    """Slides of a seed: one or two per patient, diagnoses in the shares of `MIX`. A longer cohort begins the same."""
    rng = np.random.default_rng([seed, 0, 3])
    specs: list[SlideSpec] = []
    deck: list[tuple[str, int | None]] = []
    patient = 0
    while len(specs) < slides:
        if not deck:
            deck = [MIX[i] for i in rng.permutation(len(MIX))]
        diagnosis, grade = deck.pop()
        for _ in range(int(rng.integers(1, 3))):
            specs.append(SlideSpec(len(specs), f"p{patient:05d}", diagnosis, grade))
        patient += 1
    return specs[:slides]


def _check(
    slides: int,
    seed: int,
    size_mm: float,
    mpp: float,
    questions: Sequence[str] | None,
    questions_per_slide: int | None,
    slides_per_case: int,
    val_fraction: float,
    test_fraction: float,
    workers: int,
) -> None:
    problems = []
    whole = {
        "slides": (slides, 1),
        "seed": (seed, 0),
        "workers": (workers, 1),
        "slides_per_case": (slides_per_case, 1),
    }
    if questions_per_slide is not None:
        whole["questions_per_slide"] = (questions_per_slide, 1)
    for name, (count, least) in whole.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            problems.append(f"simulator: {name} is {count!r}; give a whole number of at least {least}")
    for name, length, low, high in (("size_mm", size_mm, MIN_MM, MAX_MM), ("mpp", mpp, MIN_MPP, MAX_MPP)):
        if isinstance(length, bool) or not isinstance(length, int | float) or not low <= length <= high:
            problems.append(f"simulator: {name} is {length!r}; give a number from {low:g} to {high:g}")
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            problems.append(f"simulator: {name} is {share!r}; give a share from 0 to below 1")
    if not problems and val_fraction + test_fraction >= 1:
        problems.append("simulator: val_fraction and test_fraction leave nothing to train on; lower either")
    if questions is not None:
        kinds = (*CASE_QUESTIONS, *QUESTIONS) if slides_per_case != 1 else QUESTIONS
        if isinstance(questions, str) or not questions:
            problems.append(f"simulator: questions is {questions!r}; give a list of {', '.join(kinds)}")
        else:
            of = f" with slides_per_case {slides_per_case!r}"
            unknown = [kind for kind in questions if kind not in kinds]
            problems += [f"simulator: unknown question {kind!r}{of}; use {', '.join(kinds)}" for kind in unknown]
            if len(set(questions)) < len(questions):
                problems.append(f"simulator: questions repeat an entry: {list(questions)}; name each once")
    if problems:
        raise InputError(problems)


@dataclass
class SimulatorArguments:
    """Options of `python -m frugalpath.envs.simulator`; see `build`."""

    folder: str = field(metadata={"help": "output folder of the slides and manifest.jsonl"})
    slides: int = field(default=20, metadata={"help": "number of slides"})
    seed: int = field(default=0, metadata={"help": "random seed"})
    size_mm: float = field(default=0.896, metadata={"help": "side of a slide in millimetres"})
    mpp: float = field(default=1.0, metadata={"help": "micrometres per pixel of the base level"})
    questions: list[str] | None = field(default=None, metadata={"help": "kinds of question; default: all"})
    questions_per_slide: int | None = field(
        default=None, metadata={"help": "maximum number of questions per slide or case"}
    )
    slides_per_case: int = field(default=1, metadata={"help": "slides per case; 1 asks about single slides"})
    val_fraction: float = field(default=0.1, metadata={"help": "share of the slides for validation"})
    test_fraction: float = field(default=0.25, metadata={"help": "share of the slides for testing"})
    workers: int = field(default=2, metadata={"help": "number of drawing processes"})


@entry
def main() -> None:
    """Write slides and a manifest of their questions, with paths relative to it."""
    from transformers import HfArgumentParser  # slow to import, and needed here only

    (arguments,) = HfArgumentParser(SimulatorArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    cases = build(**vars(arguments))
    root = Path(os.path.abspath(os.path.expanduser(arguments.folder)))
    lines = []
    for case in cases:
        row = case.to_dict() | {"slides": [Path(path).relative_to(root).as_posix() for path in case.slides]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(root / "manifest.jsonl", "".join(lines))
    print(f"{len(cases)} questions about {arguments.slides} slides: {root / 'manifest.jsonl'}")


if __name__ == "__main__":
    main()
