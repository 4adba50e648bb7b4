"""Writing a synoptic report from a record; `parse_report` reads it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from frugalpath.rewards.synoptic.protocol import Field, Protocol
from frugalpath.rewards.synoptic.values import write_value

LAYOUTS = ("lines", "json", "biopsy")


def render_report(record: Mapping[str, Any], protocol: Protocol, layout: str = "lines", headings: bool = False) -> str:
    """Text of a report.

    Args:
        record: field id -> value, as `parse_report` gives it.
        protocol: of the record.
        layout: `lines` (one `name: response` a line, as synoptic reports are written), `json`, or `biopsy` (the free
            layout, for protocols that have it).
        headings: whether sections get a heading line, in the layout `lines`.

    Raises:
        KeyError: the record has a field that the protocol has not.
        ValueError: no such layout.
    """
    if layout == "json":
        return json.dumps(dict(record), ensure_ascii=False)
    if layout == "biopsy" and protocol.layout == "biopsy":
        from frugalpath.rewards.synoptic.biopsy import render_biopsy

        return render_biopsy(record, protocol)
    if layout != "lines":
        raise ValueError(f"layout {layout!r} of protocol {protocol.id!r}; it has {', '.join(layouts(protocol))}")
    lines, section = [], ""
    for name, value in record.items():
        field = protocol.by_id[name]
        if headings and field.section != section:
            section = field.section
            lines.append(section.upper())
        if field.type == "list" and value:
            lines += [f"{field.name}:", *(f"- {_entry(entry, field)}" for entry in value)]
        else:
            lines.append(f"{field.name}: {write_value(field, value)}")
    return "\n".join(lines)


def layouts(protocol: Protocol) -> tuple[str, ...]:
    """Layouts that a protocol's reports can be written in."""
    return LAYOUTS if protocol.layout == "biopsy" else LAYOUTS[:2]


def _entry(entry: Mapping[str, Any], field: Field) -> str:
    parts = []
    for inner in field.fields:
        if inner.id in entry:
            text = _guarded(write_value(inner, entry[inner.id]))
            parts.append(text if inner is field.fields[0] else f"{inner.name}: {text}")
    return "; ".join(parts)


def _guarded(text: str) -> str:
    """In quotation marks where the text holds what ends a value or a name."""
    plain = not any(c in text for c in ';:"[]()') or text[:1] == '"'
    return text if plain else json.dumps(text, ensure_ascii=False)
