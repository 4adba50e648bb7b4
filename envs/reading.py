"""Parameters for reading the rows of a manifest, and parsing of cells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalpath.errors import InputError
from frugalpath.parsing import parse_json


@dataclass(frozen=True)
class Reading:
    """Parameters for converting rows to cases, see `frugalpath.envs.manifest.build`.

    Without `gold` answers may be missing, and so may what only training needs: id and patient.
    """

    path: str
    format: str
    root: Path
    task: str | None
    prompt: str | None
    options: Sequence[str] | None
    labels: Mapping[str, str] | None
    question: str | None
    image_column: str
    slide_column: str | None
    answer_column: str
    mask_column: str | None
    patient_column: str | None
    patient_pattern: re.Pattern[str] | None
    split_column: str
    box_frame: str
    allow_outside: bool
    gold: bool = True


def cell(name: str, value: Any) -> Any:
    """A table cell can hold a list only as JSON."""
    if name in ("images", "slides", "options") and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return parse_json(value)
        except ValueError as error:
            raise InputError(f"`{name}` looks like a JSON list but is not valid ({error})") from None
    return value


def positive(value: Any, name: str) -> float:
    """Parse a number above 0 from a cell; raise InputError otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < float("inf"):
        raise InputError(f"`{name}` is {value!r}; it must be a positive number")
    return number
