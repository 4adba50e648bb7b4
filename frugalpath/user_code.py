"""Functions of the user's own, by `module:function` or `path.py:function`: found alike in every process."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from frugalpath.errors import InputError

FILE_MODULE = "frugalpath_user_"
"""How the modules' names begin that files are imported as."""
FORMER = ("envs", "models", "rewards", "rl", "sft", "slides")
"""Packages that earlier versions had at the top; they are imported below `frugalpath`."""

logger = logging.getLogger(__name__)


def load_user_module(place: str, named: str, base: str | Path | None = None) -> ModuleType:
    """The module, or the file that ends with .py, imported once a process.

    Args:
        place: a module's name, or a path.
        named: what names it, for messages, such as `reward 'mine.py:score'`.
        base: folder that a path is relative to; the current folder is tried after it.

    Raises:
        InputError: there is none.
    """
    is_file = place.endswith(".py")
    found = place if is_file else current_name(place)
    with _without_former(named):
        return _load_file(found, named, base) if is_file else _load_module(found, named)


@cache
def current_name(module_name: str) -> str:
    """What a module is called now: `rewards.text` is `frugalpath.rewards.text`, which is told once a process.

    A package of the user's own that is called like one of `FORMER` is left alone.
    """
    top = module_name.partition(".")[0]
    if top not in FORMER or not ((spec := importlib.util.find_spec(top)) is None or _is_ours(spec)):
        return module_name
    current = f"frugalpath.{module_name}"
    try:
        found = importlib.util.find_spec(current)
    except ModuleNotFoundError:  # not even its package is there
        found = None
    if found is None:
        return module_name
    logger.warning("%s is the former name of a module; write %s", module_name, current)
    return current


def _is_ours(spec: ModuleSpec) -> bool:
    """Whether a package at the top is one of a checkout of this project."""
    checkout = Path(__file__).resolve().parents[1]
    return any(Path(place).resolve().parent == checkout for place in spec.submodule_search_locations or ())


class _Former(MetaPathFinder):
    """Finds no package of a checkout at the top, where it would be a second copy of what stands below `frugalpath`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None and fullname in FORMER and (spec := PathFinder.find_spec(fullname)) and _is_ours(spec):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


@contextmanager
def _without_former(named: str) -> Iterator[None]:
    """Code of the user's that imports a package by its former name is told the present one."""
    finder = _Former()
    sys.meta_path.insert(0, finder)
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in FORMER:
            raise
        raise InputError(
            f"{named}: it imports {error.name!r}, but packages are imported below frugalpath: "
            f"from frugalpath.{error.name}…"
        ) from None
    finally:
        sys.meta_path.remove(finder)


def _load_module(module_name: str, named: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the user's module misses is that module's own error, not a wrong name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"{named}: no module {error.name!r}; check the name and PYTHONPATH") from None


def _load_file(place: str, named: str, base: str | Path | None) -> ModuleType:
    tried = [(Path(folder) / Path(place).expanduser()).resolve() for folder in (base or ".", ".")]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise InputError(f"{named}: no file {' nor '.join(dict.fromkeys(map(str, tried)))}")
    module_name = f"{FILE_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # both are set for a path that ends with .py
        module = importlib.util.module_from_spec(spec)
        # Known by its name while it is executed: dataclasses look their module up.
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]
