"""Rows of a manifest with the place each was written at, so that a bad one can be named by file and line."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from slides.errors import InputError
from slides.parsing import parse_json

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


@dataclass(frozen=True)
class Row:
    """One row: its columns and where it stands, as `file:line`, `file: row n` (parquet) or the file (folder)."""

    at: str
    values: dict[str, Any]
    number: int = 0  # counts the rows from 1


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Rows of a JSONL, JSON, CSV, TSV or parquet file, or of a folder with one sub-folder per class.

    Returns:
        the rows that could be read, and for each that could not its place and the reason.

    Raises:
        InputError: there is no such file, or it cannot be read at all.
    """
    if path.is_dir():
        return [dataclasses.replace(row, number=i) for i, row in enumerate(_folder(path), start=1)], []
    if not path.is_file():
        raise InputError(f"no manifest {path}; paths in a recipe are relative to the folder you start from")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown kind of manifest {path.suffix!r}; use {', '.join(_READERS)} or a folder")
    rows: list[Row] = []
    problems: list[str] = []
    for found in reader(path):
        if isinstance(found, str):
            problems.append(found)
        elif isinstance(found.values, dict):
            rows.append(dataclasses.replace(found, number=len(rows) + 1))
        else:
            problems.append(f"{found.at}: a {type(found.values).__name__} stands where a row with columns should")
    return rows, problems


def _folder(root: Path) -> Iterator[Row]:
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
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                values = {"file": file.relative_to(root).as_posix(), "label": folder.name}
                yield Row(str(file), values | ({"split": split} if split else {}))


def _jsonl(path: Path) -> Iterator[Row | str]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            at = f"{path}:{number}"
            if len(line) > MAX_LINE:
                yield f"{at}: a line of more than {MAX_LINE:,} bytes; the rows after it were not read"
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield Row(at, parse_json(line.decode()))
            except UnicodeDecodeError:
                yield f"{at}: not UTF-8 text; save the file as UTF-8"
            except json.JSONDecodeError as error:
                yield f"{at}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            except ValueError as error:
                yield f"{at}: not to be read as JSON ({error}); write one object a line"


def _json(path: Path) -> Iterator[Row | str]:
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
        yield Row(f"{path}:{line}" + (f" (row {number})" if line == last else ""), value)
        last = line
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            break
    if text[position : position + 1] != "]":
        yield f"{path}:{text.count(chr(10), 0, position) + 1}: the JSON array is not closed; entries may be missing"


def _csv(path: Path) -> Iterator[Row | str]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            at, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise InputError(f"{at}: the column names {header} are empty or repeat; name each column once")
            elif len(cells) != len(header):
                yield f"{at}: {len(cells)} cells for {len(header)} columns; quote cells that contain the separator"
            else:
                yield Row(at, {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()})
    except csv.Error as error:
        yield f"{path}:{reader.line_num}: not {path.suffix[1:].upper()} ({error}); the rows after it were not read"


def _parquet(path: Path) -> Iterator[Row | str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise InputError(f"{path}: states {file.metadata.num_rows:,} rows, more than {MAX_ROWS:,}; split it")
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", values)
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


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
