"""Read the rows of a manifest with their positions, so that errors name file and line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from frugalpath.envs.quick import quick_rows
from frugalpath.envs.table import ABSENT, BLOCK, Block, Collector, Row, Rows, to_block, to_blocks
from frugalpath.errors import InputError
from frugalpath.parsing import parse_json

__all__ = ["Row", "Rows", "read_rows"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MAX_LINE = 2**26  # bytes of a line of JSON
MAX_TEXT = 2**30  # bytes of JSON, CSV and TSV, which are read whole
MAX_ROWS = 50_000_000  # of a parquet file, which may state more than it holds
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def read_rows(path: Path, kinds: Mapping[str, str] | None = None) -> tuple[Rows, list[str]]:
    """Read rows of a JSONL, JSON, CSV, TSV or parquet file, or of a folder with one sub-folder per class.

    Args:
        path: the file or folder.
        kinds: what `frugalpath.envs.quick.kinds_of` found in this very file, which is then read faster.

    Returns:
        the rows that could be read, and for each that could not its place and the reason.

    Raises:
        InputError: there is no such file, or it cannot be read at all.
    """
    suffix = path.suffix.lower()
    reader: Callable[[Path], Iterator[Block | str]] = _folder
    prefix = os.sep
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"no manifest {path}; paths in a recipe are relative to the folder you start from")
        if suffix not in _READERS:
            kinds_known = ", ".join(_READERS)
            raise InputError(f"{path}: unknown kind of manifest {path.suffix!r}; use {kinds_known} or a folder")
        reader, prefix = _READERS[suffix]
    collector = Collector()
    problems: list[str] = []
    if kinds and (known := quick_rows(path, kinds)) is not None:
        return known, []
    for block in reader(path):
        if isinstance(block, str):
            problems.append(block)
        else:
            collector.add(block)
    return collector.rows(f"{path}{prefix}"), problems


def _folder(root: Path) -> Iterator[Block | str]:
    return to_blocks(_images_of(root))


def _images_of(root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """`root/class/image` or `root/split/class/image`; the rows get the columns `file`, `label` and perhaps `split`."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise InputError(f"{root}: no sub-folder; a folder manifest has one sub-folder per class")
    named = {folder: SPLIT_NAMES.get(folder.name.lower()) for folder in folders}
    if all(named.values()):
        classes = [
            (split, entry) for folder, split in named.items() for entry in sorted(folder.iterdir()) if entry.is_dir()
        ]
    else:
        classes = [(None, folder) for folder in folders]
    for split, folder in classes:
        inside = folder.relative_to(root).as_posix()
        found = []
        for parent, folders_there, files in os.walk(folder):
            below = () if parent == str(folder) else Path(parent).relative_to(folder).parts
            for name in (*folders_there, *files):
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    found.append((*below, name))
        for parts in sorted(found):
            file = "/".join((inside, *parts))
            yield file, {"file": file, "label": folder.name} | ({"split": split} if split else {})


def _row(at: str, mark: int | str, value: Any) -> tuple[int | str, dict[str, Any]] | str:
    if isinstance(value, dict):
        return mark, value
    return f"{at}: a {type(value).__name__} where a row with columns is expected"


def _jsonl(path: Path) -> Iterator[Block | str]:
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
        start = 1
        while part := list(islice(lines, BLOCK)):
            if (rows := _plain_lines(part)) is not None:
                yield to_block(range(start, start + len(part)), rows)
            else:
                yield from to_blocks(_lines(path, part, start))
                if max(map(len, part)) > MAX_LINE:
                    return
            start += len(part)


def _plain_lines(lines: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The objects of lines that hold one each and nothing else, else None; takes half the time of line by line."""
    scan = json.JSONDecoder().raw_decode
    rows: list[dict[str, Any]] = []
    at = 0
    try:
        text = b"".join(lines).decode()
        while at < len(text):
            row, at = scan(text, at)
            if type(row) is not dict or text[at] != "\n":
                return None
            rows.append(row)
            at += 1
    except (ValueError, RecursionError, IndexError):
        return None
    return rows if len(rows) == len(lines) else None  # fewer: one goes over several lines


def _lines(path: Path, lines: Sequence[bytes], start: int) -> Iterator[tuple[int | str, Any] | str]:
    for number, line in enumerate(lines, start):
        at = f"{path}:{number}"
        if len(line) > MAX_LINE:
            yield f"{at}: a line of more than {MAX_LINE:,} bytes; the rows after it were not read"
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield _row(at, number, parse_json(line.decode()))
        except UnicodeDecodeError:
            yield f"{at}: not UTF-8 text; save the file as UTF-8"
        except json.JSONDecodeError as error:
            yield f"{at}: not JSON ({error.msg} at column {error.colno}); write one object per line"
        except ValueError as error:
            yield f"{at}: cannot be read as JSON ({error}); write one object per line"


def _json(path: Path) -> Iterator[tuple[int | str, Any] | str]:
    """A JSON array, read entry by entry so that the line of each is known."""
    text = _text(path)
    decoder = json.JSONDecoder()

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position, line, counted, number, last = skip(0), 1, 0, 0, 0
    if text[position : position + 1] != "[":
        raise InputError(f"{path}: not a JSON array of rows; write [{{...}}, ...], or one object a line as .jsonl")
    position = skip(position + 1)
    while text[position : position + 1] not in ("]", ""):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            # What follows a broken entry cannot be told apart from it.
            yield f"{path}:{error.lineno}: not JSON ({error.msg}); the entries after it were not read"
            return
        except (ValueError, RecursionError):
            yield f"{path}:{line}: a number of thousands of digits, or too deep; the entries after it were not read"
            return
        number += 1
        mark = f"{line} (row {number})" if line == last else line
        yield _row(f"{path}:{mark}", mark, value)
        last = line
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            break
    if text[position : position + 1] != "]":
        yield f"{path}:{text.count(chr(10), 0, position) + 1}: the JSON array is not closed; entries may be missing"


def _csv(path: Path) -> Iterator[Block | str]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    header: list[str] = []
    marks: list[int] = []
    rows: list[list[str]] = []
    start = 1
    try:
        for cells in reader:
            mark, start = start, reader.line_num + 1
            if not cells:
                continue
            if len(cells) == len(header):
                marks.append(mark)
                rows.append(cells)
                if len(rows) == BLOCK:
                    yield _cells(header, marks, rows)
                    marks, rows = [], []
            elif not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    at = f"{path}:{mark}"
                    raise InputError(f"{at}: the column names {header} are empty or repeat; name each column once")
            else:
                at = f"{path}:{mark}"
                yield f"{at}: {len(cells)} cells for {len(header)} columns; quote cells that contain the separator"
    except csv.Error as error:
        yield f"{path}:{reader.line_num}: not {path.suffix[1:].upper()} ({error}); the rows after it were not read"
    if rows:
        yield _cells(header, marks, rows)


def _cells(header: Sequence[str], marks: Sequence[int], rows: Sequence[Sequence[str]]) -> Block:
    return Block(marks, {name: _filled(c) for name, c in zip(header, zip(*rows, strict=True), strict=True)})


def _filled(cells: Sequence[str]) -> Sequence[Any]:
    """Cells of a column; an empty one is no value."""
    return cells if all(map(str.strip, cells)) else [cell if cell.strip() else ABSENT for cell in cells]


def _parquet(path: Path) -> Iterator[Block | str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise InputError(f"{path}: states {file.metadata.num_rows:,} rows, more than {MAX_ROWS:,}; split it")
            number = 1
            for batch in file.iter_batches():
                columns = {n: column.to_pylist() for n, column in zip(batch.schema.names, batch.columns, strict=True)}
                yield Block(range(number, number + len(batch)), columns)
                number += len(batch)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({error}); write the file again") from None


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_TEXT:
        raise InputError(f"{path}: larger than {MAX_TEXT:,} bytes; write it as parquet or JSON lines")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


_READERS: dict[str, tuple[Callable[[Path], Iterator[Block | str]], str]] = {
    ".jsonl": (_jsonl, ":"),
    ".json": (lambda path: to_blocks(_json(path)), ":"),
    ".csv": (_csv, ":"),
    ".tsv": (_csv, ":"),
    ".parquet": (_parquet, ": row "),
}
