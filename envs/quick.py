"""Read JSON lines and tables again several times as fast, once it is known that the result is the same.

pyarrow parses them on all cores, but knows fewer kinds of values, and takes a missing one for an empty one. So a file
is first read line by line; where pyarrow then gives the very same columns, the same file is left to it from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute

from frugalpath.envs.table import ABSENT, BLOCK, Block, Places, Rows

FEW = 10_000
"""Different texts or lists of a column below which equal ones are not made again and again."""
_BETWEEN = "\x1f"
_TYPES = {
    "str": pyarrow.string(),
    "few str": pyarrow.string(),
    "list": pyarrow.list_(pyarrow.string()),
    "few list": pyarrow.list_(pyarrow.string()),
    "int": pyarrow.int64(),
    "float": pyarrow.float64(),
    "bool": pyarrow.bool_(),
}


def kinds_of(path: Path, rows: Rows) -> dict[str, str] | None:
    """Kind of each column, for `quick_blocks`; None if that would give other rows.

    Args:
        path: a manifest of JSON lines, CSV or TSV.
        rows: what was read from it line by line.
    """
    if list(rows.places.marks) != list(_marks(path, len(rows))):
        return None  # empty lines
    kinds = {}
    for name, column in rows.columns.items():
        types = set(map(type, column))
        missing = types & {type(None), type(ABSENT)}
        found = {t.__name__ for t in types - missing}
        if len(found) != 1 or len(missing) > 1 or not found <= _TYPES.keys():
            return None
        if found == {"list"} and set(map(type, chain.from_iterable(v for v in column if type(v) is list))) - {str}:
            return None
        kind = found.pop()
        if kind in ("str", "list") and len(set(map(id, column))) < FEW:  # equal ones have been made one
            kind = f"few {kind}"
        kinds[name] = kind + ("?" if type(ABSENT) in missing else "")
    again = quick_rows(path, kinds)
    same = again is not None and len(again) == len(rows) and again.columns == rows.columns
    return kinds if same else None


def quick_rows(path: Path, kinds: Mapping[str, str]) -> Rows | None:
    """Read rows of such a file with pyarrow; None if it cannot.

    Args:
        path: the file that `kinds_of` was given.
        kinds: what it found.
    """
    columns: dict[str, list[Any]] = {name: [] for name in kinds}
    number = 0
    try:
        for block in _blocks(path, kinds):
            number += len(block.marks)
            for name, values in block.columns.items():
                columns[name] += values
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError):
        return None  # changed meanwhile: the reader of lines says what is wrong with it
    return Rows(columns, Places(f"{path}:", _marks(path, number)))


def _marks(path: Path, number: int) -> range:
    """Lines of rows, of which tables have one of names before them."""
    first = 1 if path.suffix.lower() == ".jsonl" else 2
    return range(first, number + first)


def _blocks(path: Path, kinds: Mapping[str, str]) -> Iterator[Block]:
    import pyarrow.csv  # a tenth of a second that other manifests need not pay
    import pyarrow.json

    schema = pyarrow.schema([(name, _TYPES[kind.removesuffix("?")]) for name, kind in kinds.items()])
    if path.suffix.lower() == ".jsonl":
        options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
        table = pyarrow.json.read_json(path, parse_options=options)
    else:
        cells = pyarrow.csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        types = pyarrow.csv.ConvertOptions(column_types=schema, include_columns=schema.names)
        table = pyarrow.csv.read_csv(path, parse_options=cells, convert_options=types)
    number = 1
    for batch in table.to_batches(max_chunksize=64 * BLOCK):
        columns = {
            name: _values(column, kinds[name]) for name, column in zip(schema.names, batch.columns, strict=True)
        }
        yield Block(range(number, number + len(batch)), columns)
        number += len(batch)


def _values(column: Any, kind: str) -> Sequence[Any]:
    """A column's values. Where it goes wrong, as for lists of texts that hold `_BETWEEN`, `kinds_of` finds out."""
    if kind.startswith("few"):
        lists = kind.startswith("few list")
        texts = (pyarrow.compute.binary_join(column, _BETWEEN) if lists else column).dictionary_encode()
        different = [text.split(_BETWEEN) if lists else text for text in texts.dictionary.to_pylist()]
        values: Sequence[Any] = [None if i is None else different[i] for i in texts.indices.to_pylist()]
    elif kind.startswith("list") and not column.null_count:
        flat, ends = column.flatten().to_pylist(), column.offsets.to_pylist()
        values = [flat[a - ends[0] : b - ends[0]] for a, b in pairwise(ends)]
    else:
        values = column.to_pylist()
    return [ABSENT if v is None else v for v in values] if kind.endswith("?") and column.null_count else values
