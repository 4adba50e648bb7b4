"""The `manifest` environment: a user's own cases, in any of the formats of docs/data.md.

JSONL, JSON, CSV, TSV or parquet rows, ms-swift rows, or a folder with one sub-folder per class.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frugalpath.envs.case import SPLITS, TASKS, Case, with_splits
from frugalpath.envs.checks import check_cases, drop_copies, file_problems, warn_of_lost_slides
from frugalpath.envs.convert import Converted, Reading, to_cases
from frugalpath.envs.files import inspect_files
from frugalpath.envs.outcome import Outcome, files_of, identify, recall, remember, split_codes, unchanged
from frugalpath.envs.quick import kinds_of
from frugalpath.envs.rows import read_rows
from frugalpath.envs.splits import carve, limit_cases
from frugalpath.envs.table import ABSENT, Rows
from frugalpath.errors import InputError
from frugalpath.slides.content import without_collections
from frugalpath.slides.images import MAX_PIXELS, allow_pixels

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
        patient_column: column of the unit of splitting; by default `patient`, else `group`. Label and
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
        allow_outside: allow files outside `root`.
        allow_shared_text: allow the same open or synoptic answer in several splits.
        max_pixels: limit for images; a higher one than the default holds for all of the process.

    Returns:
        the cases in the order of the manifest.

    Raises:
        InputError: lists every invalid row by file and line.
    """
    params = locals()
    source = Path(path).expanduser()
    _check_parameters(format, task, box_frame, duplicates, val_fraction, test_fraction, need, limit)
    try:
        pattern = re.compile(patient_pattern) if patient_pattern else None
    except re.error as error:
        raise InputError(f"patient_pattern {patient_pattern!r} is not a regular expression ({error})") from None
    start = Path(root).expanduser() if root else (source if source.is_dir() else source.parent)
    known = {f.name for f in fields(Reading)} - {"root", "patient_pattern", "gold"}
    reading = Reading(root=start, patient_pattern=pattern, **{k: v for k, v in params.items() if k in known})
    with without_collections():
        return _cases(source, reading, params)


def _cases(source: Path, reading: Reading, params: Mapping[str, Any]) -> list[Case]:
    """Read the rows, and check them unless cached."""
    path, only = params["path"], params["only"] or {}
    known = {**params, "root": str(reading.root.absolute())}
    found = None if source.is_dir() else identify(source, known)
    outcome = recall(found.key) if found else None
    rows, problems = read_rows(source, outcome.kinds if outcome else None)
    if source.is_dir() and (found := identify(source, known, rows)):
        outcome = recall(found.key)
    again = found is not None and outcome is None and source.suffix.lower() in (".jsonl", ".csv", ".tsv")
    kinds = kinds_of(source, rows) if again and not problems else None
    rows = _keep(rows, only, path)
    if not len(rows) and not problems:
        raise InputError(f"{path}: no rows; the file or folder is empty" + (" or `only` keeps none" if only else ""))
    made = to_cases(rows, reading, checked=outcome is not None)
    del rows
    files = made.files.digest()
    problems += made.problems
    if found and not unchanged(source, found):
        found = outcome = None  # written to while it was read
    if outcome is not None and not problems and outcome.files == files:
        cases = _recalled(made.cases, outcome, params)
        if cases is not None:
            return cases
    cases, fresh = _check(made, problems, params)
    if found:
        remember(found.key, replace(fresh, files=files, kinds=kinds or (outcome.kinds if outcome else None)))
    return cases


def _recalled(cases: list[Case], outcome: Outcome, params: Mapping[str, Any]) -> list[Case] | None:
    """Cases of a manifest from the cached checks; None if an unusable file has become usable."""
    allow_pixels(params["max_pixels"])
    broken: dict[str, str] = {}
    if outcome.broken:
        numbers = set(outcome.broken)
        lost = {file for i, file in enumerate(files_of(cases)) if i in numbers}
        _, broken = inspect_files((), lost)
        if broken.keys() != lost:
            return None
    cases = with_splits(cases, [SPLITS[code] for code in outcome.splits.tolist()])
    cases = list(compress(cases, outcome.kept.tolist()))
    _warn(params["path"], cases, outcome.copies, broken)
    return cases


def _check(made: Converted, problems: list[str], params: Mapping[str, Any]) -> tuple[list[Case], Outcome]:
    """Look at the files, put the cases in their splits, check all of them together; the outcome is without `files`.

    Raises:
        InputError: lists all problems, including those found before.
    """
    cases, places, seed = made.cases, made.places, params["seed"]
    facts, broken = inspect_files(
        (p for case in cases for p in case.images),
        (p for case in cases for p in case.slides),
        max_pixels=params["max_pixels"],
        keys=made.files.keys(),
    )
    problems = problems + file_problems(cases, places, broken)
    val, test, shared = params["val_fraction"], params["test_fraction"], params["allow_shared_text"]
    lost = [i for i, file in enumerate(files_of(cases)) if file in broken] if broken else []
    cases = carve(cases, facts, val, test, seed, by_text=not shared)
    splits = split_codes(cases) if not problems else np.empty(0, np.uint8)
    chosen = list(range(len(cases)))
    copies = 0
    if params["duplicates"] == "drop":
        keep = drop_copies(cases, facts)
        chosen = [i for i in chosen if keep[i]]
        copies = len(cases) - len(chosen)
    if params["limit"] is not None:
        chosen = limit_cases(cases, chosen, params["limit"], seed)
    kept = np.zeros(len(cases), bool)
    kept[chosen] = True
    if len(chosen) < len(cases):
        cases, places = [cases[i] for i in chosen], places.take(chosen)
    _warn(params["path"], cases, copies, broken)
    required = [*params["need"], *(["val"] if val else []), *(["test"] if test else [])]
    if cases:
        try:
            check_cases(cases, where=places, need=required, allow_shared_text=shared, facts=facts)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return cases, Outcome("", splits, kept, lost, copies)


def _warn(path: str, cases: Sequence[Case], copies: int, broken: Mapping[str, str]) -> None:
    if copies:
        logger.warning("%s: removed %d copies of images that are in a later split", path, copies)
    warn_of_lost_slides(cases, broken)


def read_manifest(path: str | Path, *, root: str | Path | None = None, **params: Any) -> list[Case]:
    """Read and check the cases of a manifest; `params` as in `build`."""
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


def _keep(rows: Rows, only: Mapping[str, Any], path: str) -> Rows:
    for column, wanted in only.items():
        if len(rows) and column not in rows.columns:
            raise InputError(f"{path}: `only` names the column {column!r}, which no row has")
        allowed = {str(value) for value in (wanted if isinstance(wanted, (list, tuple)) else [wanted])}
        values = rows.columns.get(column, ())
        rows = rows.take([i for i, v in enumerate(values) if str(None if v is ABSENT else v) in allowed])
    return rows
