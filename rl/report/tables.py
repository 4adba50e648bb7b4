"""Parts of a summary as tables of a page, whatever their keys: mappings become rows, lists of mappings tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = dict[str, Any]
"""`caption`, `head` (names of columns) and `rows` (texts)."""

MEANS = (
    "case_score", "non_null_accuracy", "macro_accuracy", "coverage", "completeness", "critical_right",
    "critical_error_free", "hallucinated", "gain",
)  # fmt: skip


def number(value: Any) -> str:
    """A value as text: floats to three decimals or three digits, `—` for none."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ").replace("-", "−")
    if isinstance(value, float):
        size = abs(value)
        text = f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1e5 else f"{value:.3g}"
        if 0 < size < 1e-3:
            text = f"{value:.2g}"
        return text.replace("-", "−", 1)
    return str(value)


def interval(value: Any) -> str:
    """A 95 % interval."""
    low, high = value
    return f"[{number(float(low))}, {number(float(high))}]"


def label(name: Any) -> str:
    """Words of a key."""
    return str(name).replace("_", " ")


def cell(value: Any) -> str:
    """A value of a table: `{value, ci95}` with its interval, a list by its members."""
    if isinstance(value, Mapping) and "value" in value:
        ends = value.get("ci95")
        return number(value["value"]) + (f" {interval(ends)}" if ends else "")
    if isinstance(value, Mapping):
        return ", ".join(f"{label(k)} {cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(v) for v in value)
    return number(value)


def measured(part: Mapping[str, Any], within: str = "") -> list[tuple[str, str]]:
    """Name and text of all single values of a mapping, those of mappings in it too; tables in it are left out."""
    rows = []
    for key, value in part.items():
        name = f"{within}{label(key)}"
        if isinstance(value, Mapping) and "value" not in value:
            rows += measured(value, f"{name}: ")
        elif not _is_table(value):
            rows.append((name, cell(value)))
    return rows


def tables_of(part: Any, caption: str = "") -> list[Table]:
    """All tables of a part of a summary: one of its single values, then each list of mappings in it."""
    if _is_table(part):
        head = list(dict.fromkeys(key for row in part for key in row))
        rows = [[cell(row.get(key)) for key in head] for row in part]
        return [{"caption": caption, "head": [label(key) for key in head], "rows": rows}]
    if not isinstance(part, Mapping):
        return []
    singles = measured(part)
    found = [{"caption": caption, "head": ["measure", "value"], "rows": singles}] if singles else []
    return found + _inner(part, caption)


def _inner(part: Mapping[str, Any], caption: str) -> list[Table]:
    found = []
    for key, value in part.items():
        name = f"{caption}: {label(key)}" if caption else label(key)
        if _is_table(value):
            found += tables_of(value, name)
        elif isinstance(value, Mapping) and "value" not in value:
            found += _inner(value, name)
    return found


def _is_table(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)


def synoptic_tables(results: Mapping[str, Any], stages: Mapping[str, str]) -> list[Table]:
    """Tables of synoptic reports: by protocol the means of every stage, and the fields of the last stage."""
    found = []
    for protocol, by_stage in results.items():
        means = [name for name in MEANS if any(report.get(name) for report in by_stage.values())]
        rows = [
            [stages.get(stage, stage), number(report["n"]), *(cell(report.get(name)) for name in means)]
            for stage, report in by_stage.items()
        ]
        found.append({"caption": label(protocol), "head": ["stage", "n", *map(label, means)], "rows": rows})
        last, report = list(by_stage.items())[-1]
        fields = [
            [label(name), number(row["n"]), cell({"value": row["accuracy"], "ci95": row.get("ci95")})]
            for name, row in report.get("fields", {}).items()
        ]
        if fields:
            caption = f"fields of {label(protocol)}, {stages.get(last, last)}"
            found.append({"caption": caption, "head": ["field", "n", "accuracy"], "rows": fields})
    return found
