"""Values of one field: from what a report says to the form in which values are compared, and back.

A value is a str (coded value or text), an int or float (in the field's unit), a list of str (several values), a list
of dicts (entries of a list field), or None for "not applicable". A number with a bound is a str such as `< 5`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.protocol import LENGTHS, MASSES, NULL_WORDS, UNDETERMINED_WORDS, UNITS, Field

MAX_CHARS = 2_000  # of one value; a longer one cannot be read
MAX_ENTRIES = 50  # of one list
MAX_DIGITS = 12

_NULL = frozenset(map(normalise, NULL_WORDS)) | {"", "-"}
_UNDETERMINED = frozenset(map(normalise, (UNDETERMINED, *UNDETERMINED_WORDS)))
_BOUNDS = {"<": "<", "≤": "<=", "<=": "<=", ">": ">", "≥": ">=", ">=": ">=", "less than": "<", "more than": ">",
           "at least": ">=", "greater than": ">", "at most": "<=", "up to": "<="}  # fmt: skip
_BOUND = re.compile(r"(<=|>=|[<>≤≥]|less than|more than|at least|greater than|at most|up to)?\s*(.*)", re.DOTALL)
_ABOUT = re.compile(r"^(?:about|approximately|approx\.?|circa|ca\.?|~|≈)\s*")
_NUMBER = re.compile(r"(-?[0-9][0-9.,]*|\.[0-9]+)\s*([a-zµμ%]*)(?:\s+in greatest dimension)?")
_SPLIT = re.compile(r" ?(?:[,;/&+]|\band\b) ?")


class Unreadable(ValueError):
    """A value that is none of the field's; the message says what would be."""


def read_value(field: Field, raw: Any) -> Any:
    """The value of a field from text, as it stands behind the colon, or from JSON.

    Case, white space, Unicode form and punctuation around it do not matter; units convert to the field's.

    Returns:
        The value as the module describes; None for "not applicable", "n/a" or null.

    Raises:
        Unreadable: it is not one of the field's values. Two values where one is asked for are not, either.
    """
    if raw is None:
        return None
    if field.type == "list":
        return _entries(field, raw)
    if field.type == "multi" and isinstance(raw, list):
        return _several(field, [_scalar_text(field, part) for part in raw])
    value = _read_text(field, _scalar_text(field, raw))
    return list(value) if isinstance(value, list) else value  # a fresh list: the cached one must not be changed


def write_value(field: Field, value: Any) -> str:
    """Text of a value, such that `read_value` gives the value again; entries of lists are written by the renderer."""
    if value is None:
        return "not applicable"
    if isinstance(value, list):
        return ", ".join(value)
    if field.type in ("number", "integer") and field.unit and value != UNDETERMINED:
        text = value if isinstance(value, str) else number_text(value)
        return f"{text}%" if field.unit == "%" else f"{text} {field.unit}"
    if isinstance(value, (int, float)):
        return number_text(value)
    # Quotation marks keep what would be read as something else: edges, line breaks, and words for null.
    return value if field.type != "text" or _plain(value) else json.dumps(value, ensure_ascii=False)


def number_text(value: float) -> str:
    """A number without a trailing `.0`, and without an exponent."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return text if text not in ("-0", "") else "0"


def clean(text: str) -> str:
    """Single spaces, and none at the ends."""
    return " ".join(text.split())


def _plain(text: str) -> bool:
    folded = normalise(text)
    return (
        text == clean(text)
        and folded not in _NULL
        and folded not in _UNDETERMINED
        and text[:1] not in "\"'*-[{"
        and text[-1:] not in '*"'
    )


def _scalar_text(field: Field, raw: Any) -> str:
    if isinstance(raw, bool):
        return "present" if raw else "not identified"
    if isinstance(raw, (int, float)) and abs(raw) < 10**MAX_DIGITS:  # not so for NaN and the infinite
        return number_text(raw)
    if not isinstance(raw, str):
        raise Unreadable(f"{field.name}: a {type(raw).__name__} is not a value of this field")
    if len(raw) > MAX_CHARS:
        raise Unreadable(f"{field.name}: longer than {MAX_CHARS} characters")
    return raw


@functools.lru_cache(maxsize=1 << 16)
def _read_text(field: Field, text: str) -> Any:
    text = text.strip()
    quoted = _unquoted(text)
    if quoted is not None:
        if field.type == "text":
            return quoted
        text = quoted
    folded = normalise(text)
    if field.values:
        if folded in field.lookup:
            value = field.lookup[folded]
            return [value] if field.type == "multi" else value
        if folded in _NULL:
            return None
        return (
            _several(field, _SPLIT.split(clean(text.replace("\n", ";"))))
            if field.type == "multi"
            else _one(field, text)
        )
    if folded in _NULL:
        return None
    if folded in _UNDETERMINED:
        return UNDETERMINED
    return clean(text) if field.type == "text" else _number(field, folded)


def _one(field: Field, text: str) -> str:
    """A coded value, perhaps followed by a remark in brackets that is not another value."""
    bare, _, remark = text.partition("(")
    if remark.endswith(")") and (value := field.lookup.get(normalise(bare))) is not None:
        inside = normalise(remark[:-1])
        if not any(inside == word or f" {word} " in f" {inside} " for word in field.lookup):
            return value
    if field.open:
        return clean(text)
    raise Unreadable(f"{field.name}: {clean(text)[:80]!r} is not one of {', '.join(field.values)}")


def _several(field: Field, parts: list[str]) -> list[str]:
    """Values of a multi field in the protocol's order, each once; neighbours are joined where the whole is a value."""
    found: list[str] = []
    parts = [part for part in parts if part.strip(" .")]
    if len(parts) > MAX_ENTRIES:
        raise Unreadable(f"{field.name}: more than {MAX_ENTRIES} values")
    i = 0
    while i < len(parts):
        for j in range(min(len(parts), i + 4), i, -1):  # "valve, mitral and tricuspid": values may hold separators
            value = next((v for p in _joins(parts[i:j]) if (v := field.lookup.get(normalise(p))) is not None), None)
            if value is not None:
                break
        else:
            j, value = i + 1, clean(parts[i]) if field.open else None
        if value is None:
            raise Unreadable(f"{field.name}: {clean(parts[i])[:80]!r} is not one of {', '.join(field.values)}")
        found.append(value)
        i = j
    alone = {UNDETERMINED, "not identified", "none known"} & set(found)
    if not found or (alone and len(set(found)) > 1):
        raise Unreadable(
            f"{field.name}: {', '.join(found)[:80]!r} contradicts itself" if found else f"{field.name}: empty"
        )
    return sorted(dict.fromkeys(found), key=lambda v: (field.rank.get(v, len(field.rank)), v))


def _joins(parts: list[str]) -> list[str]:
    return (
        [parts[0]]
        if len(parts) == 1
        else [" and ".join(parts), ", ".join(parts), "/".join(parts), ", ".join(parts[:-1]) + " and " + parts[-1]]
    )


def _number(field: Field, folded: str) -> Any:
    """A number in the field's unit; of `2.3 x 1.2 x 1 cm` the greatest."""
    expected = f"a number{f' in {field.unit}' if field.unit else ''}"
    match = _BOUND.fullmatch(_ABOUT.sub("", folded, count=1))
    assert match is not None  # every part of the pattern may be empty
    bound, rest = _BOUNDS.get(match[1] or "", ""), match[2]
    parts = [_NUMBER.fullmatch(part.strip()) for part in re.split(r"\s*[x×]\s*", rest)] if len(rest) <= 60 else [None]
    if not all(parts) or len(parts) > 3 or (len(parts) > 1 and field.unit not in LENGTHS):
        raise Unreadable(f"{field.name}: {folded[:80]!r} is not {expected}")
    unit = next((m[2] for m in reversed(parts) if m and m[2]), "")
    values = [_decimal(m[1]) * _factor(field, m[2] or unit) for m in parts if m]
    value = round(max(values), 6)
    if not math.isfinite(value) or (field.type == "integer" and not float(value).is_integer()):
        raise Unreadable(
            f"{field.name}: {folded[:80]!r} is not {'a whole number' if field.type == 'integer' else expected}"
        )
    number: float = int(value) if float(value).is_integer() else value
    return f"{bound} {number_text(number)}" if bound else number


def _decimal(digits: str) -> float:
    """`1,200` is a grouped number, `1,2` a decimal comma; anything with more separators is no number."""
    if len(digits) > MAX_DIGITS:
        return math.nan
    if re.fullmatch(r"-?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?", digits):
        digits = digits.replace(",", "")
    digits = digits.rstrip(".,")
    try:
        return float(digits.replace(",", ".") if digits.count(",") + digits.count(".") == 1 else digits)
    except ValueError:
        return math.nan


def _factor(field: Field, unit: str) -> float:
    """What a number in `unit` is multiplied by to be in the field's; NaN where the two do not measure the same."""
    if not unit or unit == field.unit:
        return 1.0
    if unit == "percent" and field.unit == "%":
        return 1.0
    same = any(unit in kind and field.unit in kind for kind in (LENGTHS, MASSES))
    return UNITS[unit] / UNITS[field.unit] if same and field.unit else math.nan


def _unquoted(text: str) -> str | None:
    """Text of a JSON string, None where it is not one."""
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _entries(field: Field, raw: Any) -> list[dict[str, Any]] | None:
    """Entries of a list field: mappings from inner ids or names to raw values."""
    if isinstance(raw, str):
        if normalise(raw) in _NULL:
            return None
        raise Unreadable(f"{field.name}: write its entries on lines of their own, each behind a dash")
    if not isinstance(raw, list) or not all(isinstance(entry, Mapping) for entry in raw):
        raise Unreadable(f"{field.name}: expected a list of entries")
    if len(raw) > MAX_ENTRIES:
        raise Unreadable(f"{field.name}: more than {MAX_ENTRIES} entries")
    entries = []
    for entry in raw:
        read = {}
        for name, value in entry.items():
            inner = field.inner.get(normalise(str(name)))
            if inner is None:
                raise Unreadable(f"{field.name}: an entry has no {str(name)[:40]!r}; it has {', '.join(field.inner)}")
            if inner.id in read:
                raise Unreadable(f"{field.name}: an entry answers {inner.name} more than once")
            if (value := read_value(inner, value)) is not None:
                read[inner.id] = value
        if read:
            entries.append(read)
    return entries or None
