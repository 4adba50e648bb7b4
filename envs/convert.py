"""Convert rows of a manifest to cases: label tables, ms-swift rows, and rows in the format of cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from frugalpath.envs.boxes import boxes_from_mask, boxes_text, to_frame
from frugalpath.envs.bulk import bulk_cases
from frugalpath.envs.case import Case, as_text
from frugalpath.envs.files import AbsentFile, FoundFiles, resolve_path
from frugalpath.envs.reading import Reading, cell, positive
from frugalpath.envs.rows import SPLIT_NAMES
from frugalpath.envs.swift import swift_row
from frugalpath.envs.table import Places, Row, Rows
from frugalpath.errors import InputError
from frugalpath.parsing import parse_json
from frugalpath.slides.images import ImageError, open_image

__all__ = ["Converted", "Reading", "cell", "to_cases"]

_MASK = "\0mask"  # a column name no file can have


@dataclass(frozen=True)
class Converted:
    """Cases and problems of a manifest's rows.

    Attributes:
        cases: of the rows that are one.
        places: where each of them stands.
        problems: of the other rows, with their places.
        files: that the rows name.
    """

    cases: list[Case]
    places: Places
    problems: list[str]
    files: FoundFiles


def to_cases(rows: Rows, reading: Reading, *, checked: bool = False) -> Converted:
    """Convert rows to cases, all at once if they have no problems (`frugalpath.envs.bulk`), else one by one.

    Args:
        rows: of the manifest.
        reading: how they are read.
        checked: these very rows have become cases before, none of which had a problem.
    """
    format = _format(rows, reading)
    options = reading.options
    if format == "labels":
        _check_label_parameters(rows, reading)
        # What new rows happen to be labelled as, if they are at all, are not the options they were asked with.
        known = reading.gold or reading.labels is not None
        if options is None and known and (reading.task or "choice") == "choice" and not reading.mask_column:
            options = _known_labels(rows, reading)
    files = FoundFiles(_entries(rows, reading, format), reading.root, allow_outside=reading.allow_outside)

    def resolve(entry: str) -> str:
        return str(resolve_path(entry, reading.root, allow_outside=reading.allow_outside))

    bulk = partial(bulk_cases, rows, reading, format, options, files.paths, resolve, checked)
    cases = bulk()
    if not files.finish() and cases is not None:  # with links, or files that are not there
        cases = bulk()
    if cases is not None:
        return Converted(cases, rows.places, [], files)
    split_given = reading.split_column in rows.columns
    cases, kept, problems = [], [], []
    for i, row in enumerate(tqdm(rows, desc="read manifest", unit="row", disable=len(rows) < 2000, leave=False)):
        if split_given and reading.split_column not in row.values:
            problems.append(
                f"{row.at}: `{reading.split_column}` is empty here but not in other rows; give every row one"
            )
        try:
            cases.append(_to_case(row, reading, format, options, files.paths))
            kept.append(i)
        except InputError as error:
            problems += [f"{row.at}: {problem}" for problem in error.problems]
    return Converted(cases, rows.places.take(kept), problems, files)


def _entries(rows: Rows, reading: Reading, format: str) -> Iterator[str]:
    """File entries of the rows."""
    names = [reading.image_column, reading.slide_column] if format == "labels" else []
    for name in dict.fromkeys((*names, "images", "slides")):
        column = rows.columns.get(name, ()) if name is not None else ()
        if set(map(type, column)) == {list} and set(map(type, chain.from_iterable(column))) == {str}:
            yield from chain.from_iterable(column)
            continue
        for value in column:
            if type(value) is str:
                if not value.lstrip().startswith("["):
                    yield value
                    continue
                with suppress(InputError):
                    value = cell("images", value)
            if type(value) is list:
                # Those of ms-swift may be objects.
                entries = (entry.get("path") if type(entry) is dict else entry for entry in value)
                yield from (entry for entry in entries if type(entry) is str)


def _format(rows: Rows, reading: Reading) -> str:
    if reading.format != "auto":
        return reading.format
    columns = rows.columns.keys()
    if "messages" in columns:
        return "swift"
    source = Path(reading.path).expanduser()
    table = source.is_dir() or source.suffix.lower() in (".csv", ".tsv")
    return "labels" if table and not {"prompt", "answer"} <= columns else "cases"


def _check_label_parameters(rows: Rows, reading: Reading) -> None:
    columns = sorted(rows.columns)
    problems = []
    wanted = {
        "answer_column": reading.answer_column if reading.gold and not reading.mask_column else None,
        "mask_column": reading.mask_column if reading.gold else None,
        "patient_column": reading.patient_column,
        "slide_column": reading.slide_column,
        "image_column": None if reading.slide_column else reading.image_column,
    }
    for name, column in wanted.items():
        if rows and column is not None and column not in columns:
            problems.append(f"{reading.path}: no column {column!r} ({name}); the columns are {', '.join(columns)}")
    if reading.prompt is None and "prompt" not in columns:
        problems.append(f"{reading.path}: rows of labels hold no question; set `prompt`")
    if problems:
        raise InputError(problems)


def _to_case(row: Row, reading: Reading, format: str, options: Sequence[str] | None, paths: Mapping[str, str]) -> Case:
    """Convert one row; raise InputError with its problems, without its position."""
    values = {key: value for key, value in row.values.items() if value is not None}
    default = "detection" if reading.mask_column else "choice"
    task = values.get("task", reading.task or (default if format == "labels" else None))
    problems = []
    if task is None:
        problems.append("`task` is missing; add the column, or set the parameter task for all rows")
    try:
        if format == "swift":
            values = swift_row(values, task=task, options=options, gold=reading.gold)
            values.setdefault("id", f"{Path(reading.path).stem}:{row.number}")
        elif format == "labels":
            values = _label_values(row, reading)
        else:
            values = {key: cell(key, value) for key, value in values.items()}
            if not reading.gold:
                values.setdefault("id", f"{Path(reading.path).stem}:{row.number}")
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    defaults: dict[str, Any] = {"task": task, "prompt": reading.prompt, "question": reading.question}
    if task == "choice":
        defaults["options"] = options
    values = {**{key: value for key, value in defaults.items() if value is not None}, **values}
    problems = _resolve(values, reading, paths)
    try:
        named = _finish(values, reading, task, fallback=format != "cases" or not reading.gold, readable=not problems)
        case = replace(Case.from_dict(values, gold=reading.gold), patient_named=named)
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return case


def _resolve(values: dict[str, Any], reading: Reading, paths: Mapping[str, str]) -> list[str]:
    """Make paths absolute in place; return the problems of the others.

    A slide that is not there is no problem of a case that has something else to show: it keeps its place.
    """
    problems: list[str] = []
    absent: list[str] = []
    present = 0
    for name in ("images", "slides"):
        entries = [values[name]] if isinstance(values.get(name), str) else values.get(name)
        if not isinstance(entries, list):
            continue
        values[name] = []
        for entry in entries:
            try:
                if isinstance(entry, str):
                    found = paths.get(entry)
                    entry = found or str(resolve_path(entry, reading.root, allow_outside=reading.allow_outside))
                    present += 1
            except AbsentFile as error:
                (absent if name == "slides" else problems).append(str(error))
                entry = str(error.path)
            except ValueError as error:
                problems.append(str(error))
            values[name].append(entry)
    problems += [] if present else absent
    protocol = values.get("protocol")
    if isinstance(protocol, str) and protocol.endswith((".yaml", ".yml")):  # a file of the user's, not a name
        try:
            values["protocol"] = str(resolve_path(protocol, reading.root, allow_outside=reading.allow_outside))
        except ValueError as error:
            problems.append(str(error))
    return problems


def _finish(values: dict[str, Any], reading: Reading, task: str | None, *, fallback: bool, readable: bool) -> bool:
    """Set patient, split, boxes and resolution in place; files are opened only when they are `readable`.

    Returns:
        whether the row names its patient. With `fallback` one that does not is a patient by file stem.
    """
    # What is of another type is told by the case.
    lists = (values.get(name) for name in ("images", "slides"))
    files = [file for found in lists if isinstance(found, list) for file in found if isinstance(file, str)]
    patient = _patient(values, files, reading)
    if patient is not None:
        values["patient"] = patient
    elif fallback and files:
        values["patient"] = Path(files[0]).stem
    if reading.split_column in values:
        split = str(values.pop(reading.split_column))
        values["split"] = SPLIT_NAMES.get(split.strip().lower(), split)
    if task == "detection" and readable:
        _set_boxes(values, reading)
    if "mpp" in values:
        values["mpp"] = positive(values["mpp"], "mpp")
    return patient is not None


def _known_labels(rows: Rows, reading: Reading) -> list[str]:
    """Options of a labels manifest: in the order of `labels` where the user names them, else sorted."""
    if reading.labels is not None:
        return list(dict.fromkeys(reading.labels.values()))
    values: Iterable[Any] = rows.columns.get(reading.answer_column, ())
    if set(map(type, values)) == {str}:
        values = set(values)
    return sorted({as_text(value) for value in values if isinstance(value, (str, int, float))})


def _label(row: Row, reading: Reading) -> str:
    """The answer of a labels row, renamed where `labels` says so."""
    label = as_text(row.values[reading.answer_column])
    if reading.labels is None:
        return label
    if label not in reading.labels:
        raise InputError(f"the label {label!r} is not in `labels`, which names {', '.join(map(str, reading.labels))}")
    return reading.labels[label]


def _label_values(row: Row, reading: Reading) -> dict[str, Any]:
    """Columns of a case out of a row with a file and a label (or a mask); other columns are kept."""
    column, target = (reading.image_column, "images")
    if reading.slide_column is not None:
        column, target = reading.slide_column, "slides"
    used = {column, reading.mask_column} if reading.mask_column else {column, reading.answer_column}
    values = {key: value for key, value in row.values.items() if key not in used}
    needed = used if reading.gold else {column}
    missing = [name for name in needed if name is not None and name not in row.values]
    if missing:
        raise InputError([f"`{name}` is empty" for name in sorted(missing)])
    file = str(row.values[column])
    values[target] = [file]
    values.setdefault("id", f"{reading.question}/{file}" if reading.question else file)
    if reading.mask_column:
        values |= {_MASK: str(row.values[reading.mask_column])} if reading.mask_column in row.values else {}
    elif reading.answer_column in row.values:
        values["answer"] = _label(row, reading)
    return values


def _patient(values: Mapping[str, Any], files: Sequence[str], reading: Reading) -> str | None:
    """Unit of splitting; None if the row names none."""
    if reading.patient_pattern is not None and files:
        match = reading.patient_pattern.search(Path(files[0]).name)
        if not match or not match.groups() or not match.group(1):
            raise InputError(f"patient_pattern finds no patient in the file name {Path(files[0]).name!r}")
        return match.group(1)
    names = [reading.patient_column] if reading.patient_column else ["patient", "group"]
    for name in names:
        if values.get(name) not in (None, ""):
            return as_text(values[name])
    if reading.patient_column:
        raise InputError(f"`{reading.patient_column}` (patient_column) is empty")
    return None


def _set_boxes(values: dict[str, Any], reading: Reading) -> None:
    """Turn a mask or pixel boxes into the gold answer in 0..1000."""
    mask = values.pop(_MASK, None)
    pixels = reading.box_frame == "pixels" and mask is None
    if not (mask or pixels) or (pixels and not reading.gold and "answer" not in values):
        return
    shown = values.get("images")
    if not shown or not isinstance(shown, list):
        return  # told by the case
    try:
        with open_image(shown[0]) as image:
            size = image.size
        if mask:
            path = resolve_path(mask, reading.root, allow_outside=reading.allow_outside)
            values["answer"] = boxes_text(boxes_from_mask(str(path), size))
        else:
            answer = values.get("answer")
            boxes = parse_json(answer) if isinstance(answer, str) else answer
            if not isinstance(boxes, list):
                raise TypeError
            values["answer"] = boxes_text(to_frame(boxes, *size))
    except ImageError as error:
        raise InputError(f"the image or its mask {error}") from None
    except (TypeError, json.JSONDecodeError, OverflowError):
        raise InputError("`answer` of a detection case is not a list of [x1, y1, x2, y2] in pixels") from None
    except ValueError as error:
        raise InputError(str(error)) from None
