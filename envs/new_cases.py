"""New cases for a trained run to answer: they need no gold answer, split or patient."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frugalpath.envs.case import Case
from frugalpath.envs.checks import file_problems, warn_of_lost_slides
from frugalpath.envs.convert import Reading, to_cases
from frugalpath.envs.files import inspect_files
from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError
from frugalpath.slides.images import MAX_PIXELS, OR_DROP

COLUMNS = {"image_column": "file", "slide_column": None, "answer_column": "label", "split_column": "split"}
"""Columns of a manifest of labels, as `frugalpath.envs.manifest.build` has them."""


def new_case(
    images: Sequence[str],
    slides: Sequence[str],
    prompt: str,
    *,
    task: str | None = None,
    options: Sequence[str] | None = None,
    question: str = "",
    protocol: str | None = None,
) -> Case:
    """Make a case from a question and files.

    Args:
        images, slides: paths from the working folder.
        task: by default `choice` where there are options, else `open`.
        question: kind of question, for tables; the task by default.

    Raises:
        InputError: lists all problems of the question and its files.
    """
    name = Path((*images, *slides, "case")[0]).stem
    case = Case(
        id=name,
        patient=name,
        task=task or ("choice" if options else "open"),
        prompt=prompt,
        answer="",
        images=tuple(str(Path(p).expanduser().resolve()) for p in images),
        slides=tuple(str(Path(p).expanduser().resolve()) for p in slides),
        options=None if options is None else tuple(options),
        protocol=protocol,
        split="test",
        question=question,
        patient_named=False,
    )
    # What someone names by hand is meant: no slide is left out.
    _, broken = inspect_files(case.images, case.slides)
    problems = [*case.problems(gold=False), *(f"{path}: {why.removesuffix(OR_DROP)}" for path, why in broken.items())]
    if problems:
        raise InputError(problems)
    return case


def read_new_cases(
    path: str, params: Mapping[str, Any] | None = None, *, root: str | None = None, **given: Any
) -> list[Case]:
    """Cases of a manifest in any format of docs/data.md; gold answers, ids and patients may be missing.

    A slide that is not there is left out, with a warning, where its case has others.

    Args:
        params: of `envs.manifest.build`, such as a recipe's own; of them those that say what a row holds are used.
        root: the folder relative paths start from; the manifest's own by default.
        given: task, prompt, options or question of rows without one, in place of those in `params`.

    Raises:
        InputError: lists every invalid row by file and line.
    """
    source = Path(path).expanduser()
    known = {f.name for f in dataclasses.fields(Reading)} - {"path", "root", "gold"}
    values: dict[str, Any] = {
        **dict.fromkeys(known),
        "format": "auto",
        "box_frame": "thousand",
        "allow_outside": False,
        **COLUMNS,
    }
    values |= {k: v for k, v in (params or {}).items() if k in known}
    values |= {k: v for k, v in given.items() if v is not None}
    pattern = values["patient_pattern"]
    values["patient_pattern"] = re.compile(pattern) if pattern else None
    start = Path(root).expanduser() if root else (source if source.is_dir() else source.parent)
    rows, problems = read_rows(source)
    if not rows and not problems:
        raise InputError(f"{path}: no rows; the file or folder is empty")
    made = to_cases(rows, Reading(path=path, root=start, gold=False, **values))
    cases = made.cases
    _, broken = inspect_files(
        (p for c in cases for p in c.images),
        (p for c in cases for p in c.slides),
        max_pixels=(params or {}).get("max_pixels", MAX_PIXELS),
        keys=made.files.keys(),
    )
    warn_of_lost_slides(cases, broken)
    problems += made.problems + file_problems(cases, made.places, broken)
    repeated = [name for name, count in Counter(c.id for c in cases).items() if count > 1]
    problems += [f"{path}: the id {name!r} is given more than once; ids must be unique" for name in repeated]
    if problems:
        raise InputError(problems)
    return cases
