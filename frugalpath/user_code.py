"""Functions of the user's own, by `module:function` or `path.py:function`: found alike in every process."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from frugalpath.errors import InputError

FILE_MODULE = "frugalpath_user_"
"""How the modules' names begin that files are imported as."""


def load_user_module(place: str, named: str, base: str | Path | None = None) -> ModuleType:
    """The module, or the file that ends with .py, imported once a process.

    Args:
        place: a module's name, or a path.
        named: what names it, for messages, such as `reward 'mine.py:score'`.
        base: folder that a path is relative to; the current folder is tried after it.

    Raises:
        InputError: there is none.
    """
    return _load_file(place, named, base) if place.endswith(".py") else _load_module(place, named)


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
