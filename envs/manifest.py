"""The `manifest` environment: a user's own cases, in any of the formats of docs/data.md.

JSONL, JSON, CSV, TSV or parquet rows, ms-swift rows, or a folder with one sub-folder per class.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from envs.case import SPLITS, TASKS, Case
from envs.checks import check_cases, drop_copies, file_problems, warn_of_lost_slides
from envs.convert import Reading, to_cases
from envs.files import inspect_files
from envs.rows import Row, read_rows
from envs.splits import carve, limit_cases
from slides.errors import InputError
from slides.images import MAX_PIXELS

logger = logging.getLogger(__name__)


def build(
    *,
    path: str,
    root: str | None = None,
    format: Literal["auto", "cases", "labels", "swift"] = "auto",
    task: str | None = None,
    prompt: str | None = None,
    options: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    question: str | None = None,
    image_column: str = "file",
    slide_column: str | None = None,
    answer_column: str = "label",
    mask_column: str | None = None,
    patient_column: str | None = None,
    patient_pattern: str | None = None,
    split_column: str = "split",
    only: Mapping[str, Any] | None = None,
    box_frame: Literal["thousand", "pixels"] = "thousand",
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    duplicates: Literal["error", "drop"] = "error",
    need: Sequence[str] = (),
    allow_outside: bool = False,
    allow_shared_text: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[Case]:
    """Read, split and check the cases of a manifest.

    Args:
        path: the manifest file, or a folder with one sub-folder per class (perhaps under `train`, `val`, `test`).
        root: the folder relative paths start from; the manifest's own folder by default.
        format: `cases` (columns of `Case`), `labels` (a file and a label in each row) or `swift` (`messages`,
            `images`); `auto` takes CSV and folders for labels unless they have `prompt` and `answer`, rows with
            `messages` for swift, and all else for cases.
        task: task of rows that do not state one; labels are `choice` by default, or `detection` with `mask_column`.
        prompt: prompt of rows that have none; required for labels.
        options: options of rows that have none; for labels by default the sorted labels of all rows.
        labels: answer to write for each label, such as `{ADI: adipose tissue}`; names every label.
        question: kind of question, for tables by question; it also begins the ids of label rows.
        image_column, slide_column, answer_column: columns of a labels manifest; `slide_column` is for rows of slides.
        mask_column: column of instance masks (0 is background) whose bounding boxes are the answer.
        patient_column: column of what may not be divided by a split; by default `patient`, else `group`. Label and
            swift rows without either are each their own, by file stem.
        patient_pattern: regular expression on the file name whose first group is the patient.
        split_column: column of the split.
        only: keep rows with these values, such as `{magnification: 400x}` or `{grade: [I, II]}`.
        box_frame: `pixels` when detection answers are in pixels of the image; they are turned into 0..1000.
        val_fraction, test_fraction: share taken out of train, patient by patient, where the data has no such split.
        seed: of the splits and of `limit`.
        limit: at most so many cases per split, spread over the answers.
        duplicates: what to do with copies of one image in two splits: `error`, or `drop` them from the earlier split.
        need: splits that must hold cases.
        allow_outside: let rows name files outside `root`.
        allow_shared_text: let an open or synoptic answer stand in two splits.
        max_pixels: limit for images; a higher one than the default holds for all of the process.

    Returns:
        the cases in the order of the manifest.

    Raises:
        InputError: with every bad row, by file and line.
    """
    source = Path(path).expanduser()
    _check_parameters(format, task, box_frame, duplicates, val_fraction, test_fraction, need, limit)
    try:
        pattern = re.compile(patient_pattern) if patient_pattern else None
    except re.error as error:
        raise InputError(f"patient_pattern {patient_pattern!r} is not a regular expression ({error})") from None
    reading = Reading(
        path=path,
        format=format,
        root=Path(root).expanduser() if root else (source if source.is_dir() else source.parent),
        task=task,
        prompt=prompt,
        options=options,
        labels=labels,
        question=question,
        image_column=image_column,
        slide_column=slide_column,
        answer_column=answer_column,
        mask_column=mask_column,
        patient_column=patient_column,
        patient_pattern=pattern,
        split_column=split_column,
        box_frame=box_frame,
        allow_outside=allow_outside,
    )
    rows, problems = read_rows(source)
    rows = _keep(rows, only or {}, path)
    if not rows and not problems:
        raise InputError(f"{path}: no rows; the file or folder is empty" + (" or `only` keeps none" if only else ""))
    cases, places, found = to_cases(rows, reading)
    problems += found
    facts, broken = inspect_files(
        (p for case in cases for p in case.images), (p for case in cases for p in case.slides), max_pixels=max_pixels
    )
    problems += file_problems(cases, places, broken)
    cases = carve(cases, facts, val_fraction, test_fraction, seed, by_text=not allow_shared_text)
    chosen = list(range(len(cases)))
    if duplicates == "drop":
        keep = drop_copies(cases, facts)
        chosen = [i for i in chosen if keep[i]]
        if len(chosen) < len(cases):
            logger.warning("%s: left out %d copies of images in a later split", path, len(cases) - len(chosen))
    if limit is not None:
        chosen = limit_cases(cases, chosen, limit, seed)
    cases, places = [cases[i] for i in chosen], [places[i] for i in chosen]
    warn_of_lost_slides(cases, broken)
    required = [*need, *(["val"] if val_fraction else []), *(["test"] if test_fraction else [])]
    if cases:
        try:
            check_cases(cases, where=places, need=required, allow_shared_text=allow_shared_text, facts=facts)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return cases


def read_manifest(path: str | Path, *, root: str | Path | None = None, **params: Any) -> list[Case]:
    """Cases of a manifest, checked; `params` as in `build`."""
    return build(path=str(path), root=None if root is None else str(root), **params)


def _check_parameters(format, task, box_frame, duplicates, val_fraction, test_fraction, need, limit) -> None:
    problems = []
    for name, value, allowed in (
        ("format", format, ("auto", "cases", "labels", "swift")),
        ("task", task, (None, *TASKS)),
        ("box_frame", box_frame, ("thousand", "pixels")),
        ("duplicates", duplicates, ("error", "drop")),
        *(("need", split, SPLITS) for split in need),
    ):
        if value not in allowed:
            known = ", ".join(entry for entry in allowed if entry)
            problems.append(f"parameter {name!r} of the manifest is {value!r}; use one of {known}")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        problems.append(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must be 0 or more and leave train a part"
        )
    if limit is not None and limit < 1:
        problems.append(f"limit is {limit}; give at least 1, or leave it out for all cases")
    if problems:
        raise InputError(problems)


def _keep(rows: list[Row], only: Mapping[str, Any], path: str) -> list[Row]:
    for column, wanted in only.items():
        if rows and not any(column in row.values for row in rows):
            raise InputError(f"{path}: `only` names the column {column!r}, which no row has")
        allowed = {str(value) for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])}
        rows = [row for row in rows if str(row.values.get(column)) in allowed]
    return rows
