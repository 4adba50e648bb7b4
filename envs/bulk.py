"""Convert rows to cases column by column, for plain rows without problems.

The rule is `envs.convert._to_case`, which takes rows one by one and says what is wrong with each. Here all rows are
turned at once into what it would make of them, or none: a column that is not plain, or a case with a problem, leaves
all of them to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from frugalpath.envs.case import FIELDS, Case, as_text, faulty_cases
from frugalpath.envs.reading import Reading, cell, positive
from frugalpath.envs.rows import SPLIT_NAMES
from frugalpath.envs.table import ABSENT, Rows
from frugalpath.errors import InputError

_NOTHING = {type(None), type(ABSENT)}
_FILES = ("images", "slides")


class _NotPlainError(Exception):
    """These rows are not for this module."""


def bulk_cases(
    rows: Rows,
    reading: Reading,
    format: str,
    options: Sequence[str] | None,
    paths: Mapping[str, str],
    resolve: Callable[[str], str],
    checked: bool = False,
) -> list[Case] | None:
    """Convert all rows to cases; return None if rows must be converted one by one.

    Args:
        rows: of the manifest.
        reading: how they are read.
        format: `cases` or `labels`; others are not for this function.
        options: of choice cases without their own.
        paths: by entry, of the files that are there.
        resolve: the path of an entry that is not among them; raises ValueError where it is none.
        checked: these very rows have become cases before, none of which had a problem.
    """
    if format not in ("cases", "labels") or not reading.gold or reading.mask_column or reading.box_frame == "pixels":
        return None
    if not len(rows):
        return None
    try:
        cases = _cases(rows, reading, format, options, paths, resolve)
    except (_NotPlainError, InputError, ValueError, TypeError, IndexError):  # of values where others belong
        return None
    return None if not checked and faulty_cases(cases) else cases


def _cases(rows, reading, format, options, paths, resolve) -> list[Case]:
    number = len(rows)
    columns = dict(rows.columns)
    labels = format == "labels"
    if labels:
        _check_labels(columns, reading)
        answers = _texts(columns.pop(reading.answer_column, None))
        if reading.labels is not None:
            answers = [_named(reading.labels, answer) for answer in answers]
        entries = _texts(columns.pop(reading.slide_column or reading.image_column, None))
        files: dict[str, Any] = {name: repeat((), number) for name in _FILES}
        first = [paths.get(entry) or resolve(entry) for entry in entries]
        files["slides" if reading.slide_column is not None else "images"] = list(zip(first, strict=True))
        ids = _texts(columns.pop("id")) if "id" in columns else _label_ids(entries, reading.question)
    else:
        answers = columns.pop("answer", None)
        files = {name: _files(columns.pop(name, None), number, paths, resolve) for name in _FILES}
        first = [images[0] if images else slides[0] for images, slides in zip(*files.values(), strict=True)]
        ids = _texts(columns.pop("id", None))
    tasks = _or_default(columns.pop("task", None), number, reading.task or ("choice" if labels else None))
    if not labels:
        answers = _answers(answers, tasks)
    protocols = columns.pop("protocol", None)
    made: dict[str, Any] = {
        "id": ids,
        "task": tasks,
        "prompt": _or_default(columns.pop("prompt", None), number, reading.prompt),
        "answer": answers,
        **files,
        "options": _options(columns.pop("options", None), tasks, options),
        "protocol": _protocols(protocols, resolve) if protocols is not None else repeat(None, number),
        "split": _splits(columns, reading, number),
    }
    made["patient"], made["patient_named"] = _patients(columns, reading, first, fallback=labels)
    questions = _or_default(columns.pop("question", None), number, reading.question or "")
    made["question"] = [question or task for question, task in zip(questions, tasks, strict=True)]
    columns.pop("patient", None)
    made["extra"] = _extra(columns, number)
    return Case.from_columns(made, number)


def _check_labels(columns: Mapping[str, Sequence[Any]], reading: Reading) -> None:
    """Columns with an empty value in place of none: the rows of labels tell these apart."""
    if set(columns) & {*_FILES, "options"} or any(
        None in columns[name] for name in ("id", "task", "prompt", "protocol", "question", "mpp") if name in columns
    ):
        raise _NotPlainError


def _types(column: Sequence[Any]) -> set[type]:
    return set(map(type, column))


def _texts(column: Sequence[Any] | None) -> list[str]:
    """A column of texts and whole numbers without gaps, as texts."""
    if column is None:
        raise _NotPlainError
    types = _types(column)
    if types == {str}:
        return column  # type: ignore[return-value]
    if types <= {str, int}:
        return list(map(as_text, column))
    raise _NotPlainError


def _answers(column: Sequence[Any] | None, tasks: Sequence[str]) -> list[str]:
    """Answers as texts; those of detection and synoptic cases may be JSON values."""
    if column is None or not _types(column) <= {str, int, list, dict}:
        raise _NotPlainError
    if not _types(column) & {list, dict}:
        return _texts(column)
    made = []
    for value, task in zip(column, tasks, strict=True):
        if type(value) in (str, int):
            value = as_text(value)
        elif task in ("detection", "synoptic"):
            value = json.dumps(value, ensure_ascii=False)
        else:
            raise _NotPlainError
        made.append(value)
    return made


def _or_default(column: Sequence[Any] | None, number: int, default: str | None) -> list[str]:
    """A column of texts, with a default in its gaps."""
    if column is None:
        column = [ABSENT] * number
    types = _types(column)
    if types == {str}:
        return column  # type: ignore[return-value]
    if type(default) is not str or not types <= {str, *_NOTHING}:
        raise _NotPlainError
    return [default if value is ABSENT or value is None else value for value in column]


def _named(labels: Mapping[str, str], label: str) -> str:
    if label not in labels:
        raise _NotPlainError
    name = labels[label]
    if type(name) is not str:
        raise _NotPlainError
    return name


def _label_ids(entries: list[str], question: str | None) -> list[str]:
    return [f"{question}/{entry}" for entry in entries] if question else entries


def _files(column: Sequence[Any] | None, number: int, paths, resolve) -> list[tuple[str, ...]]:
    """Paths of each row, from a path, a list of them, or such a list as JSON."""
    if column is None:
        return [()] * number
    types = _types(column)
    if not types <= {str, list, *_NOTHING}:
        raise _NotPlainError
    if types == {list} and set(map(len, column)) == {1}:
        entries = list(chain.from_iterable(column))
        if _types(entries) != {str}:
            raise _NotPlainError
        return list(zip([paths.get(entry) or resolve(entry) for entry in entries], strict=True))
    made: list[tuple[str, ...]] = []
    for value in column:
        if type(value) is str:
            value = cell("images", value) if value.lstrip().startswith("[") else [value]
        elif type(value) is not list:
            value = []
        if not all(type(entry) is str for entry in value):
            raise _NotPlainError
        made.append(tuple([paths.get(entry) or resolve(entry) for entry in value]))
    return made


def _options(column: Sequence[Any] | None, tasks: Sequence[str], options: Sequence[str] | None) -> list[Any]:
    """Options of each row; equal ones are one tuple."""
    if options is not None and not (type(options) in (list, tuple) and _types(options) <= {str, int}):
        raise _NotPlainError
    default = None if options is None else tuple(map(as_text, options))
    if column is None:
        return [default if task == "choice" else None for task in tasks]
    equal: dict[tuple[str, ...], tuple[str, ...]] = {}
    ids = list(map(id, column))  # readers keep equal lists once
    known: dict[int, tuple[str, ...] | None] = {}
    for name, value in dict(zip(ids, column, strict=True)).items():
        if value is None or value is ABSENT:
            known[name] = None
            continue
        entries = cell("options", value)
        if type(entries) is not list or not _types(entries) <= {str}:
            raise _NotPlainError
        known[name] = equal.setdefault(tuple(entries), tuple(entries))
    made = list(map(known.__getitem__, ids))
    if default is None or None not in known.values():
        return made
    return [default if own is None and task == "choice" else own for own, task in zip(made, tasks, strict=True)]


def _protocols(column: Sequence[Any], resolve: Callable[[str], str]) -> list[str | None]:
    """Names, or files of the user's."""
    if not _types(column) <= {str, *_NOTHING}:
        raise _NotPlainError
    known = {value: value for value in set(column) if type(value) is str}
    known |= {value: resolve(value) for value in known if value.endswith((".yaml", ".yml"))}
    return [known[value] if type(value) is str else None for value in column]


def _splits(columns: dict[str, Any], reading: Reading, number: int) -> Any:
    column = columns.pop(reading.split_column, None)
    if column is None:
        if "split" in columns:
            raise _NotPlainError
        return repeat("train", number)
    if reading.split_column != "split":
        columns.pop("split", None)
    if _types(column) != {str}:
        raise _NotPlainError
    names = {value: SPLIT_NAMES.get(value.strip().lower(), value) for value in set(column)}
    return [names[value] for value in column]


def _patients(
    columns: Mapping[str, Any], reading: Reading, first: Sequence[str], *, fallback: bool
) -> tuple[Any, Any]:
    """The patient of each row, and whether the row names it."""
    if reading.patient_pattern is not None:
        return [_match(reading.patient_pattern, path) for path in first], repeat(True, len(first))
    names = [reading.patient_column] if reading.patient_column else ["patient", "group"]
    for name in names:
        if name in columns:
            if _types(columns[name]) <= {str, int} and "" not in columns[name]:
                return _texts(columns[name]), repeat(True, len(first))
            raise _NotPlainError
    if not fallback or reading.patient_column:
        raise _NotPlainError
    return [_stem(path) for path in first], repeat(False, len(first))


def _match(pattern: re.Pattern[str], path: str) -> str:
    match = pattern.search(path.rpartition("/")[2])
    if not match or not match.groups() or not match.group(1):
        raise _NotPlainError
    return match.group(1)


def _stem(path: str) -> str:
    """That of pathlib, which would take a second for each hundred thousand."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def _extra(columns: dict[str, Sequence[Any]], number: int) -> list[dict[str, Any]]:
    """All other columns of each row, without what is missing."""
    if columns.keys() & FIELDS:
        raise _NotPlainError
    if not columns:
        return [{} for _ in range(number)]
    if "mpp" in columns:
        columns["mpp"] = _resolutions(columns["mpp"])
    if not any(_types(column) & {float, *_NOTHING} for column in columns.values()):
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [
        {
            name: value
            for name, value in zip(columns, values, strict=True)
            if value is not None and value is not ABSENT and value == value  # NaN: an empty cell
        }
        for values in zip(*columns.values(), strict=True)
    ]


def _resolutions(column: Sequence[Any]) -> list[Any]:
    if not _types(column) <= {str, int, float, *_NOTHING}:
        raise _NotPlainError
    known = {value: positive(value, "mpp") for value in set(column) if value is not None and value is not ABSENT}
    return [known.get(value, value) for value in column]
