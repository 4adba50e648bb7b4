"""Check and convert the values of a recipe by the types of its dataclasses."""

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
"""A number written as text: YAML 1.1 reads 5e-4, which has no point, as text."""
WHOLE = "; write a whole number"
"""Remedy where text such as 1e3 stands for a whole number."""
PLAIN_TYPES = {int, float, bool, NoneType}
NAMES = {int: "an integer", float: "a number", str: "text", NoneType: "null"}
"""Types as messages name them."""
PLURALS = {int: "integers", float: "numbers", bool: "true or false", str: "texts"}


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Collect the problems of an InputError raised in the block, to report them together."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def checked(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Make a dataclass from a mapping.

    Raises:
        InputError: values of the wrong type, and unknown keys with the closest known one.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a mapping of keys to values, got {values!r}")
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems = [f"{where}: unknown key {key!r}{suggest(key, known)}" for key in values if key not in known]
    taken: dict[str, Any] = {}
    for key in (key for key in values if key in known):
        with collect_errors(problems):
            value = taken[key] = read(values[key], hints[key], f"{where}.{key}")
            if dataclasses.is_dataclass(hints[key]):
                taken[key] = checked(hints[key], value, f"{where}.{key}")  # type: ignore[arg-type]
    if problems:
        raise InputError(problems)
    return cls(**taken)


def plain_types(cls: type[Any]) -> dict[str, Any]:
    """Types of a trainer's arguments that are numbers or switches; others are left to the trainer to check."""
    return {k: hint for k, hint in get_type_hints(cls).items() if set(_alternatives(hint)) <= PLAIN_TYPES}


def typed(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert values to their types; those without a type stay as they are.

    Args:
        where: prefix of a key in messages.

    Raises:
        InputError: names every key whose value has the wrong type.
    """
    problems: list[str] = []
    taken = dict(values)
    for key in (key for key in values if key in types):
        with collect_errors(problems):
            taken[key] = read(values[key], types[key], f"{where}{key}")
    if problems:
        raise InputError(problems)
    return taken


def read(value: Any, hint: Any, where: str) -> Any:
    """Convert a YAML value to its type; a number that YAML has read as text becomes the number.

    Raises:
        InputError: the value has the wrong type.
    """
    taken = _number(value, hint)
    if fits(taken, hint):
        return taken
    remedy = (
        WHOLE if isinstance(value, str) and PLAIN.fullmatch(value) and fits(0, hint) and not fits(0.5, hint) else ""
    )
    raise InputError(f"{where}: expected {_named(hint)}, got {value!r}{remedy}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value has a type; types that YAML does not have are not checked."""
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


def suggest(key: object, known: Collection[str]) -> str:
    """Suggest the closest known key, or to remove an unknown one."""
    found = difflib.get_close_matches(str(key), sorted(known), 1)
    return f"; did you mean {found[0]!r}?" if found else "; remove it"


def _named(hint: Any) -> str:
    """A type in words, such as "a list of integers or null"."""
    found: list[str] = []
    for each in _alternatives(hint):
        inner = get_args(each)
        many = PLURALS.get(inner[-1]) if inner else None
        if get_origin(each) is list:
            found.append(f"a list of {many}" if many else "a list")
        elif get_origin(each) is dict:
            found.append(f"a mapping of names to {many}" if many else "a mapping")
        else:
            found += ["true", "false"] if each is bool else [NAMES.get(each) or str(getattr(each, "__name__", each))]
    return " or ".join(part for part in (", ".join(found[:-1]), found[-1]) if part)


def _number(value: Any, hint: Any) -> Any:
    """Convert text to numbers where numbers are expected."""
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
