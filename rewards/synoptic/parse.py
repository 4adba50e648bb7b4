"""Reading a synoptic report: `name: response` lines, JSON, or the free layout of biopsy reports.

Nothing here raises for what a policy may write: what cannot be read is returned as such, and the time is linear in the
length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.biopsy import parse_biopsy
from frugalpath.rewards.synoptic.protocol import UNITS, Field, Protocol
from frugalpath.rewards.synoptic.report import Report, split_outside
from frugalpath.rewards.synoptic.values import MAX_ENTRIES, Unreadable, read_value

MAX_CHARS = 12_000  # of a report; the longest real ones have some 6,000
MAX_LINES = 500

_FENCE = re.compile(r"```[a-z]*\n(.*?)\n?```", re.DOTALL)
_UNKNOWN = object()  # the value of a line that belongs to no field, whatever it says
_BULLET = re.compile(r"(?:[-•*+]|[0-9]{1,2}[.)])\s+")


def parse_report(text: str, protocol: Protocol) -> Report:
    """Read a report.

    Args:
        text: of the report: JSON (an object of field ids or names), `name: response` lines with or without headings,
            or, for a protocol with that layout, a biopsy report as signed out.
        protocol: whose fields are looked for.
    """
    if len(text) > MAX_CHARS:
        return Report(unknown=[f"{text[:40]}... (longer than {MAX_CHARS} characters)"])
    if fenced := _FENCE.fullmatch(text.strip()):
        text = fenced[1]
    if text.lstrip().startswith("{"):
        return _json(text, protocol)
    lines = [line for line in text.splitlines() if line.strip()][:MAX_LINES]
    if protocol.layout == "biopsy" and not any(_named(line, protocol) for line in lines):
        return parse_biopsy(text, protocol)
    return _collect(_lines(lines, protocol), protocol)


def read_record(values: Mapping[str, Any], protocol: Protocol) -> Report:
    """A report from a mapping of field ids or names to raw values, such as a row of a table."""
    return _collect(((str(name), value) for name, value in values.items()), protocol)


def _collect(answers: Iterator[tuple[str, Any]], protocol: Protocol) -> Report:
    """A report from names and raw values; a name that is no field's comes with the text it stands for."""
    report = Report()
    seen: set[str] = set()
    for name, raw in answers:
        found = None if raw is _UNKNOWN else protocol.by_name.get(normalise(name))
        if found is None:
            report.unknown.append(name)
        elif found.id in seen:
            report.repeated.append(found.name)
        else:
            seen.add(found.id)
            try:
                report.record[found.id] = read_value(found, raw)
            except Unreadable as error:
                report.unreadable[found.id] = str(error)
    for name in report.repeated:
        identity = protocol.by_name[normalise(name)].id
        report.record.pop(identity, None)
        report.unreadable.pop(identity, None)
    report.record = protocol.ordered(report.record)
    return report


def _named(line: str, protocol: Protocol) -> tuple[Field, str] | None:
    """The field that a line answers and the response; None for any other line."""
    name, colon, response = line.partition(":")
    if not colon:
        return None
    name = _BULLET.sub("", name.strip(" \t*#"), count=1).strip(" \t*_")
    found = protocol.by_name.get(normalise(name))
    if found is not None:
        return found, response.strip(" \t*")
    bare, _, hint = name.partition("(")  # "Tumour size (mm): 12"
    found = protocol.by_name.get(normalise(bare))
    if found is None:
        return None
    unit, response = normalise(hint.rstrip(" )")), response.strip(" \t*")
    return found, f"{response} {unit}" if unit in UNITS and response[-1:].isdigit() else response


def _lines(lines: list[str], protocol: Protocol) -> Iterator[tuple[str, Any]]:
    """Names and raw values of `name: response` lines; what belongs to no field as a name of its own."""
    current: Field | None = None
    value: Any = None
    for line in lines:
        named = _named(line, protocol)
        inside = current is not None and current.type == "list" and line.lstrip()[:1] in ("-", "•", "*")
        if named is not None and not (inside and normalise(line.partition(":")[0].strip(" -•*")) in current.inner):  # type: ignore[union-attr]
            if current is not None:
                yield current.id, value
            current, value = named
            if current.type == "list" and not value:
                value = []
        elif normalise(line.strip(" *#_=-:")) in protocol.sections:
            if current is not None:
                yield current.id, value
            current = None
        elif inside and isinstance(value, list):
            value.append(_entry(line.strip().lstrip("-•* "), current))  # type: ignore[arg-type]
        elif current is not None and isinstance(value, str) and (not value or current.type in ("text", "multi")):
            value = f"{value}\n{_BULLET.sub('', line.strip(), count=1)}" if value else line.strip()
        else:
            yield line.strip(), _UNKNOWN
    if current is not None:
        yield current.id, value


def _entry(text: str, field: Field | None) -> dict[str, Any]:
    """Raw values of one entry of a list, `value; name: value; ...`, the first value being that of the first field."""
    assert field is not None
    entry: dict[str, Any] = {}
    for i, part in enumerate(split_outside(text, ";")[: MAX_ENTRIES + 1]):
        name, colon, value = part.partition(":")
        inner = field.inner.get(normalise(name)) if colon else None
        if inner is None:
            inner, value = (field.fields[0], part) if i == 0 else (None, "")
        # A second answer to the same field, or a part that is none, spoils the entry: `read_value` then refuses it.
        entry[inner.id if inner is not None and inner.id not in entry else part] = value
    return entry


class _Pairs(list[tuple[str, Any]]):
    """Keys and values of a JSON object, repeated keys included."""


def _json(text: str, protocol: Protocol) -> Report:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return Report(unknown=[text[:80]])
    answers: list[tuple[str, Any]] = []
    for name, value in pairs:
        if isinstance(value, _Pairs) and normalise(name) in protocol.sections:
            answers += value
        else:
            answers.append((name, value))
    return _collect(((str(name), _plain(value)) for name, value in answers), protocol)


def _plain(value: Any) -> Any:
    """A list's entries as mappings; an entry that repeats a key keeps it under a name that no field has."""
    if isinstance(value, _Pairs):
        return {}
    if not isinstance(value, list):
        return value
    entries = []
    for entry in value[: MAX_ENTRIES + 1]:
        if isinstance(entry, _Pairs):
            keys = [name for name, _ in entry]
            entries.append(dict(entry) if len(set(keys)) == len(keys) else {"a repeated key": None})
        else:
            entries.append(entry)
    return entries
