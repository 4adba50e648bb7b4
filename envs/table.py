"""Rows of a manifest, kept in columns: as dictionaries, a million rows would take more than a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

ABSENT: Any = object()
"""Marks a column that a row does not have, unlike an empty value (None)."""

BLOCK = 1000
"""Number of rows that readers pass on together."""
_SHARED = 10_000  # different values of a column up to which equal ones are kept once


@dataclass(frozen=True)
class Row:
    """One row: its columns and where it stands, as `file:line`, `file: row n` (parquet) or the file (folder)."""

    at: str
    values: dict[str, Any]
    number: int = 0  # counts the rows from 1


class Places(Sequence[str]):
    """Positions of rows, formatted on demand.

    Args:
        prefix: begins all of them.
        marks: line or row number, or text, of each.
    """

    def __init__(self, prefix: str, marks: Sequence[int | str]):
        self.prefix = prefix
        self.marks = marks

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, at: Any) -> Any:
        return Places(self.prefix, self.marks[at]) if isinstance(at, slice) else f"{self.prefix}{self.marks[at]}"

    def take(self, chosen: Iterable[int]) -> Places:
        """The places of some rows."""
        return Places(self.prefix, [self.marks[i] for i in chosen])


@dataclass(frozen=True)
class Block:
    """Some rows as a reader gives them: the mark of each, and columns of their length."""

    marks: Sequence[int | str]
    columns: Mapping[str, Sequence[Any]]


class Rows(Sequence[Row]):
    """Rows in columns.

    Attributes:
        columns: values by name, ABSENT where a row lacks the column.
        places: where each row stands.
        numbers: of each row, from 1.
    """

    def __init__(self, columns: dict[str, list[Any]], places: Places, numbers: Sequence[int] | None = None):
        self.columns = columns
        self.places = places
        self.numbers = range(1, len(places) + 1) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return self.take(range(len(self))[at])
        values = {name: column[at] for name, column in self.columns.items() if column[at] is not ABSENT}
        return Row(self.places[at], values, self.numbers[at])

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def take(self, chosen: Sequence[int]) -> Rows:
        """Some of the rows."""
        columns = {name: [column[i] for i in chosen] for name, column in self.columns.items()}
        known = {name: column for name, column in columns.items() if any(value is not ABSENT for value in column)}
        return Rows(known, self.places.take(chosen), [self.numbers[i] for i in chosen])


class Collector:
    """Puts the blocks of a reader together; equal texts of a column with few different ones are kept once."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {}
        self._marks: list[int | str] = []
        self._known: dict[str, dict | None] = {}

    def add(self, block: Block) -> None:
        """Append the rows of a block."""
        for name in block.columns.keys() - self._columns.keys():
            self._columns[name] = [ABSENT] * len(self._marks)
            self._known[name] = {}
        for name, column in self._columns.items():
            if name in block.columns:
                column += self._shared(name, block.columns[name])
            else:
                column += [ABSENT] * len(block.marks)
        self._marks += block.marks

    def rows(self, prefix: str) -> Rows:
        """All rows; `prefix` begins their places."""
        return Rows(self._columns, Places(prefix, self._marks))

    def _shared(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        known = self._known[name]
        if known is None:
            return values
        types = set(map(type, values)) - {type(None), type(ABSENT)}
        if types == {str}:
            shared = list(map(known.setdefault, values, values))
        elif types == {list} and set(map(type, chain.from_iterable(v for v in values if type(v) is list))) <= {str}:
            shared = [known.setdefault(tuple(v), v) if type(v) is list else v for v in values]
        else:
            # Numbers stay as they are: 1, 1.0 and true are equal.
            self._known[name] = None
            return values
        if len(known) > _SHARED:
            self._known[name] = None
        return shared


def to_blocks(found: Iterable[tuple[int | str, Any] | str]) -> Iterator[Block | str]:
    """Blocks of rows that come one by one as (mark, values); texts, which tell of bad rows, are passed on."""
    marks: list[int | str] = []
    rows: list[Mapping[str, Any]] = []
    for each in found:
        if isinstance(each, str):
            yield each
            continue
        marks.append(each[0])
        rows.append(each[1])
        if len(rows) == BLOCK:
            yield to_block(marks, rows)
            marks, rows = [], []
    if rows:
        yield to_block(marks, rows)


def to_block(marks: Sequence[int | str], rows: Sequence[Mapping[str, Any]]) -> Block:
    """A block of rows that are dictionaries."""
    first = rows[0].keys()
    if all(row.keys() == first for row in rows):
        return Block(marks, {name: list(map(itemgetter(name), rows)) for name in first})
    names = dict.fromkeys(chain.from_iterable(rows))
    return Block(marks, {name: [row.get(name, ABSENT) for row in rows] for name in names})
