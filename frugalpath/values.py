"""Values of a recipe against the types of the dataclasses that they belong to."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from frugalpath.errors import InputError

T = TypeVar("T")

PLAIN = re.compile(r"[-+]?(\d{1,50}(\.\d{0,50})?|\.\d{1,50})([eE][-+]?\d{1,3})?")
"""A number as text: YAML 1.1 reads 5e-4, without a point, as one."""
WHOLE = "; write a whole number"
"""Remedy where a text such as 1e3 stands for one."""
PLAIN_TYPES = {int, float, bool, NoneType}


@contextmanager
def told(problems: list[str]) -> Iterator[None]:
    """Add the problems of an InputError in the block to those that are told together."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def checked(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Make a dataclass from a mapping; wrong types and unknown keys are errors, which name the nearest known key."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: {values!r} is no mapping of keys to values")
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"{where}: unknown key {key!r}{near(key, known)}" for key in values if key not in known]
    taken: dict[str, Any] = {}
    for key in (key for key in values if key in known):
        with told(problems):
            value = taken[key] = read(values[key], hints[key], f"{where}.{key}")
            if dataclasses.is_dataclass(hints[key]):
                taken[key] = checked(hints[key], value, f"{where}.{key}")  # type: ignore[arg-type]
    if problems:
        raise InputError(problems)
    return cls(**taken)


def plain_types(cls: type[Any]) -> dict[str, Any]:
    """Types of a trainer's arguments that are numbers or switches; what it takes for others is its own affair."""
    return {k: hint for k, hint in get_type_hints(cls).items() if set(_alternatives(hint)) <= PLAIN_TYPES}


def typed(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values as their types want them, those without a type as they are.

    Args:
        where: what stands before a key in messages.

    Raises:
        InputError: naming every key whose value is of another type.
    """
    problems: list[str] = []
    taken = dict(values)
    for key in (key for key in values if key in types):
        with told(problems):
            taken[key] = read(values[key], types[key], f"{where}{key}")
    if problems:
        raise InputError(problems)
    return taken


def read(value: Any, hint: Any, where: str) -> Any:
    """A value of YAML as its type wants it; a plain number that YAML has read as text is taken for the number.

    Raises:
        InputError: it is of another type.
    """
    taken = _number(value, hint)
    if fits(taken, hint):
        return taken
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    remedy = WHOLE if isinstance(value, str) and PLAIN.fullmatch(value) and fits(0, hint) else ""
    raise InputError(f"{where}: {value!r} is no {name}{remedy}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is of a type; types that YAML does not have are not looked into."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def near(key: object, known: Collection[str]) -> str:
    """What a misspelt key may have meant, or what to do with it."""
    found = difflib.get_close_matches(str(key), sorted(known), 1)
    return f"; did you mean {found[0]!r}?" if found else "; remove it"


def _number(value: Any, hint: Any) -> Any:
    """The value with its texts made numbers where numbers are wanted."""
    if fits(value, hint):
        return value
    for each in _alternatives(hint):
        if get_origin(each) is list and isinstance(value, list):
            return [_number(v, get_args(each)[0]) for v in value]
        if get_origin(each) is dict and isinstance(value, dict):
            return {k: _number(v, get_args(each)[1]) for k, v in value.items()}
    if isinstance(value, str) and PLAIN.fullmatch(value):
        if fits(0, hint) and re.fullmatch(r"[-+]?\d+", value):
            return int(value)
        if fits(0.0, hint) and math.isfinite(number := float(value)):
            return number
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
