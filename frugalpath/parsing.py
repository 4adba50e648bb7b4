"""Read JSON and YAML from untrusted files, with size limits and a fixed set of errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from frugalpath.errors import InputError

MAX_YAML = 2**20
"""Maximum size of a YAML file, in bytes."""
MAX_NODES = 200_000
"""Maximum number of values after expanding aliases: a few lines of nested aliases can stand for billions."""

MAX_DIGITS = 250
"""Maximum number of digits of an integer in a YAML file."""


def parse_json(text: str) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: not valid JSON (a `json.JSONDecodeError`), nested too deep, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file, see `parse_yaml`.

    Raises:
        InputError: the file cannot be read or is not valid.
    """
    try:
        if path.stat().st_size > MAX_YAML:
            raise InputError(f"{path}: larger than {MAX_YAML:,} bytes; split it, or keep data in a manifest")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text that holds plain data only, no Python objects.

    Raises:
        InputError: not valid, an alias to itself, or more than `MAX_NODES` values; the message begins with `where`.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MAX_NODES:
            raise InputError(f"{where}: holds more than {MAX_NODES:,} values after expanding aliases; shorten it")
        return loader.construct_document(node)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{where}: not valid YAML: nested too deep; flatten it") from None
    # Besides its own errors, the package passes on those of invalid dates and numbers.
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: not valid YAML: {error}; correct it there") from error
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values in a node, with aliases expanded."""
    if id(node) not in known:
        if node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:  # hexadecimal ones know no limit of Python's
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        known[id(node)] = MAX_NODES + 1  # met again before it is counted: it holds itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in inner))
    return known[id(node)]
