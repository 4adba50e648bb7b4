"""Result of parsing a synoptic report, and splitting text outside brackets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """A parsed report.

    Args:
        record: field id -> value (see `values`), in the protocol's order. None: "not applicable". A field that is not
            answered is not in it.
        unreadable: field id -> why its response is none of the field's values.
        repeated: names of fields that are answered more than once; their answers are in neither of the two above.
        unknown: lines or keys that belong to no field.
    """

    record: dict[str, Any] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def readable(self) -> bool:
        """Whether it is a report at all: at least one field is answered, and none twice."""
        return bool(self.record or self.unreadable) and not self.repeated

    @property
    def problems(self) -> list[str]:
        """All that could not be read, as sentences."""
        found = [*self.unreadable.values(), *(f"{name}: answered more than once" for name in self.repeated)]
        found += [f"{text[:80]!r} belongs to no field" for text in self.unknown]
        return found or ([] if self.record else ["no field is answered"])


def split_outside(text: str, separator: str) -> list[str]:
    """Parts of a text between separators that stand outside brackets and quotation marks, stripped."""
    parts, depth, quoted, start, escaped = [], 0, False, 0, False
    for i, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted:
            escaped, quoted = char == "\\", char != '"'
        elif char == '"':
            quoted = True
        elif char in "([":
            depth += 1
        elif char in ")]":
            depth = max(0, depth - 1)
        elif char == separator and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]
