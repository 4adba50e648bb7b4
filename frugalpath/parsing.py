"""JSON and YAML from files that others wrote: bounded, and with no error but those named here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from frugalpath.errors import InputError

MAX_YAML = 2**20
"""Bytes of a YAML file."""
MAX_NODES = 200_000
"""Values of a YAML file once its aliases are written out: a few lines of nested aliases can stand for billions."""

MAX_DIGITS = 250
"""Of a whole number in a YAML file."""


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        ValueError: it is none, is nested too deep or holds a number of thousands of digits; where the text itself is
            wrong a `json.JSONDecodeError`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_yaml(path: Path) -> Any:
    """The value in a YAML file, see `parse_yaml`.

    Raises:
        InputError: the file cannot be read, or is not valid.
    """
    try:
        if path.stat().st_size > MAX_YAML:
            raise InputError(f"{path}: larger than {MAX_YAML:,} bytes; split it, or keep data in a manifest")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: plain data alone, no objects.

    Raises:
        InputError: naming `where`: not valid, an alias to itself, or more than `MAX_NODES` values.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise InputError(f"{where}: holds more than {MAX_NODES:,} values with its aliases; write it smaller")
        return loader.construct_document(node)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deep; write it flatter") from None
    # Beside its own errors the package passes on those of dates and numbers that do not exist.
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not valid YAML: {error}; mend it there") from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, those of aliases counted where they stand."""
    if id(node) not in known:
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:  # hexadecimal ones know no limit of Python's
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        known[id(node)] = MAX_NODES + 1  # met again before it is counted: it holds itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in inner))
    return known[id(node)]
