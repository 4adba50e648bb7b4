"""A case: one question over one or more fields of view or slides, with its gold answer.

Cases as the columns that reward functions get.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from frugalpath.errors import InputError
from frugalpath.parsing import parse_json

TASKS = ("choice", "open", "detection", "synoptic")
SPLITS = ("train", "val", "test")
FRAME = 1000  # boxes are written in 0..FRAME on both axes, whatever the size the image is shown at


@dataclass(frozen=True, slots=True)
class Case:
    """One question with its inputs and its gold answer.

    Args:
        id: unique name of the case.
        patient: the unit of splitting; all cases of one patient lie in one split.
        task: `choice`, `open`, `detection` or `synoptic`. Always stated, never guessed from the answer.
        prompt: the question as the model sees it.
        answer: the gold answer; for `detection` the JSON text `[[x1, y1, x2, y2], ...]` in 0..1000. Empty for a new
            case that is only to be answered.
        images: absolute paths of fields of view (png, jpg, tif).
        slides: absolute paths of what OpenSlide reads, or of feature files (`.h5`).
        options: the possible answers of a `choice` case.
        protocol: name of the synoptic protocol of a `synoptic` case.
        split: `train`, `val` or `test`.
        question: kind of question, for tables by question; the task when it is left empty.
        extra: all other columns of the row, handed to reward functions by name.
        patient_named: whether the data names the patient; otherwise the case counts as one of its own.
    """

    id: str
    patient: str
    task: str
    prompt: str
    answer: str
    images: tuple[str, ...] = ()
    slides: tuple[str, ...] = ()
    options: tuple[str, ...] | None = None
    protocol: str | None = None
    split: str = "train"
    question: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    patient_named: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", tuple(self.images))
        object.__setattr__(self, "slides", tuple(self.slides))
        if self.options is not None:
            object.__setattr__(self, "options", tuple(self.options))
        object.__setattr__(self, "question", self.question or self.task)
        object.__setattr__(self, "extra", dict(self.extra))

    def problems(self, *, gold: bool = True) -> list[str]:
        """List the problems of this case alone; files are not opened.

        Args:
            gold: whether it must have a gold answer.
        """
        found = []
        answered = gold or bool(self.answer.strip())
        for name in ("id", "patient", "prompt"):
            if not getattr(self, name).strip():
                found.append(f"`{name}` is empty; give every row one")
        if self.task not in TASKS:
            found.append(f"`task` is {self.task!r}; use one of {', '.join(TASKS)}")
        if self.split not in SPLITS:
            found.append(f"`split` is {self.split!r}; use one of {', '.join(SPLITS)}")
        if self.task != "detection" and answered and not self.answer.strip():
            found.append("`answer` is empty; give the gold answer or leave the row out")
        if not self.images and not self.slides:
            found.append("no `images` and no `slides`; give at least one path")
        if self.task == "detection" and answered:
            try:
                parse_boxes(self.answer)
            except ValueError as error:
                found.append(f"`answer` of a detection case {error}")
        if self.options is not None:
            found += self._option_problems(self.options)
        clash = sorted(FIELDS & set(self.extra))
        if clash:
            found.append(f"`extra` holds {', '.join(clash)}, which are columns of their own; rename them")
        return found

    def _option_problems(self, options: tuple[str, ...]) -> list[str]:
        if self.task != "choice":
            return [f"`options` given for a {self.task!r} case; only `choice` has options"]
        found = []
        if len(options) < 2 or any(not option.strip() for option in options):
            found.append("`options` needs at least two non-empty entries")
        folded = [option.strip().casefold() for option in options]
        if len(set(folded)) < len(folded):
            found.append(f"`options` repeat an entry: {list(options)}; keep each once")
        if self.answer.strip() and self.answer not in options:
            found.append(f"`answer` {self.answer!r} is not one of the options {list(options)}; correct either")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Convert to a flat JSONL row, with `extra` as columns and without empty optional columns."""
        row: dict[str, Any] = {name: getattr(self, name) for name in ("id", "patient", "task", "prompt", "answer")}
        for name in ("images", "slides", "options"):
            if getattr(self, name):
                row[name] = list(getattr(self, name))
        if self.protocol is not None:
            row["protocol"] = self.protocol
        return row | {"split": self.split, "question": self.question} | dict(self.extra)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Iterable[Any]], number: int) -> list[Case]:
        """Make many cases at once, ten times as fast; values are not checked.

        Args:
            columns: for each field its value in every case, of the very type that it has in a case.
            number: of cases.
        """
        cases = [cls.__new__(cls) for _ in range(number)]
        for each in fields(cls):
            deque(map(getattr(cls, each.name).__set__, cases, columns[each.name]), maxlen=0)
        return cases

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], *, gold: bool = True) -> Case:
        """Build a case from a flat row; numbers become text, a detection or synoptic answer may be a JSON value.

        Args:
            gold: whether it must have a gold answer.

        Raises:
            InputError: lists all problems of the row.
        """
        values = {key: value for key, value in row.items() if not _is_missing(value)}
        if not gold:
            values.setdefault("answer", "")
        missing = [name for name in ("id", "patient", "task", "prompt", "answer") if name not in values]
        found = [f"`{name}` is missing" for name in missing]
        kwargs: dict[str, Any] = {}
        for name in ("id", "patient", "task", "prompt", "protocol", "split", "question"):
            if name in values:
                if isinstance(values[name], (str, int, float)):
                    kwargs[name] = as_text(values[name])
                else:
                    found.append(f"`{name}` is a {type(values[name]).__name__}; it must be text")
        if "answer" in values:
            answer = values["answer"]
            if isinstance(answer, (str, int, float)):
                kwargs["answer"] = as_text(answer)
            elif kwargs.get("task") in ("detection", "synoptic"):
                kwargs["answer"] = json.dumps(answer, ensure_ascii=False)
            else:
                found.append(f"`answer` is a {type(answer).__name__}; it must be text")
        for name in ("images", "slides", "options"):
            if name in values:
                entries = [values[name]] if isinstance(values[name], str) and name != "options" else values[name]
                if isinstance(entries, (list, tuple)) and all(isinstance(e, (str, int, float)) for e in entries):
                    kwargs[name] = tuple(as_text(entry) for entry in entries)
                else:
                    found.append(f"`{name}` must be a list of text")
        if found:
            raise InputError(found)
        case = cls(**kwargs, extra={key: value for key, value in values.items() if key not in FIELDS})
        if found := case.problems(gold=gold):
            raise InputError(found)
        return case


def with_splits(cases: Sequence[Case], splits: Sequence[str]) -> list[Case]:
    """Move cases to other splits; unchanged cases are not copied."""
    moving = [i for i, (case, split) in enumerate(zip(cases, splits, strict=True)) if case.split != split]
    columns: dict[str, Iterable[Any]] = {
        each.name: [getattr(cases[i], each.name) for i in moving] for each in fields(Case)
    }
    columns |= {"split": [splits[i] for i in moving], "extra": [dict(cases[i].extra) for i in moving]}
    moved = list(cases)
    for i, case in zip(moving, Case.from_columns(columns, len(moving)), strict=True):
        moved[i] = case
    return moved


def faulty_cases(cases: Sequence[Case]) -> list[int]:
    """Indices of the cases with `problems`; values shared by cases are checked once."""
    one_of_each = dict(zip(map(attrgetter("task", "options", "answer", "split"), cases), cases, strict=True))
    if len(one_of_each) > len(cases) // 2:  # free answers: there is nothing to tell of them but whether they are empty
        one_of_each = {
            (c.task, c.options, c.split, c.answer if c.options or c.task == "detection" else ""): c for c in cases
        }
    texts = (c.id.strip() and c.patient.strip() and c.prompt.strip() and c.answer.strip() for c in cases)
    files = (c.images or c.slides for c in cases)
    other = (c.extra and not FIELDS.isdisjoint(c.extra) for c in cases)
    if all(texts) and all(files) and not any(other) and not any(c.problems() for c in one_of_each.values()):
        return []
    return [i for i, case in enumerate(cases) if case.problems()]


FIELDS = frozenset(f.name for f in fields(Case)) - {"patient_named"}
"""Columns of a row that are fields of a case."""


def parse_boxes(text: str) -> list[tuple[float, float, float, float]]:
    """Parse the boxes of a gold detection answer, `[[x1, y1, x2, y2], ...]` in 0..1000 with x1 < x2 and y1 < y2.

    Raises:
        ValueError: the message continues a sentence that begins with the column's name.
    """
    try:
        boxes = parse_json(text)
    except ValueError:
        boxes = None
    if not isinstance(boxes, list):
        raise ValueError(f"is not a JSON list of boxes: {text[:80]!r}; write [[x1, y1, x2, y2], ...], or [] for none")
    for box in boxes:
        if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
            raise ValueError(f"has the box {box!r}; a box is four numbers [x1, y1, x2, y2]")
        x1, y1, x2, y2 = box
        if not (0 <= x1 < x2 <= FRAME and 0 <= y1 < y2 <= FRAME):
            raise ValueError(
                f"has the box {box!r}; boxes are in 0..{FRAME} of the image's width and height, with x1 < x2, y1 < y2"
            )
    return [tuple(box) for box in boxes]


def as_text(value: str | int | float) -> str:
    """Text of a scalar; a whole number that a table reader turned into a float loses its `.0`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _is_missing(value: Any) -> bool:
    """Table readers write an empty cell as None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def case_columns(case: Case, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Columns of a case as passed to reward functions; `extra` are the further columns of the whole set."""
    return {
        "id": case.id,
        "patient": case.patient,
        "task": case.task,
        "question": case.question,
        "answer": case.answer,
        "options": list(case.options) if case.options else None,
        "protocol": case.protocol,
        **{k: case.extra.get(k) for k in extra},
    }


def extra_columns(cases: Sequence[Case]) -> list[str]:
    """Names of all further columns that any of the cases has."""
    return sorted({k for c in cases for k in c.extra})
