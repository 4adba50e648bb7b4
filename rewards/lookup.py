"""Reward functions by name: the registered ones, and those of modules and files, found alike in every process."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import operator
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import rewards
from slides.errors import InputError

RewardFn = Callable[..., Any]
F = TypeVar("F", bound=RewardFn)

FILE_MODULE = "user_reward_"  # how the modules are called that files are imported as

_registered: dict[str, RewardFn] = {}


def reward(name: str) -> Callable[[F], F]:
    """Register a function under a name that recipes can use. The function itself stays as it is.

    Example:
        >>> @reward("short")
        ... def short(completions, **columns):
        ...     return [float(len(str(c)) < 400) for c in completions]
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"reward name {name!r}: use letters, digits and underscores")

    def register(function: F) -> F:
        known = _registered.get(name)
        if known is not None and _address(known) != _address(function):
            raise ValueError(
                f"reward name {name!r} is taken by {_address(known)}; choose another for {_address(function)}"
            )
        _registered[name] = function
        return function

    return register


def reward_names() -> list[str]:
    """Names of all registered rewards, the built-in ones included."""
    for module in pkgutil.iter_modules(rewards.__path__):
        importlib.import_module(f"rewards.{module.name}")
    return sorted(_registered)


def find(name: str, base: str | Path | None = None) -> tuple[str, str, RewardFn]:
    """Name for the logs, source that finds the function again in another process, and the function.

    Args:
        name: a registered name, `module:function` or `path.py:function`.
        base: folder that a path is relative to; the current folder is tried after it.

    Raises:
        InputError: there is no such name, module, file or function.
    """
    place, separator, function_name = name.rpartition(":")
    if not separator:
        names = reward_names()
        if name not in names:
            raise InputError(
                f"unknown reward {name!r}; {hint(name, names)}. A function of your own is named as 'module:function' "
                "or 'path.py:function'"
            )
        return name, _address(_registered[name]), _registered[name]
    module = load(place, name, base)
    try:
        function = operator.attrgetter(function_name)(module)
    except AttributeError:
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"reward {name!r}: no {function_name!r} in {place}; {hint(function_name, names)}") from None
    if not callable(function):
        raise InputError(f"reward {name!r}: {function_name!r} in {place} is not a function")
    return function_name, f"{module.__file__ if place.endswith('.py') else place}:{function_name}", function


def load(place: str, name: str, base: str | Path | None = None) -> ModuleType:
    """The module, or the file that ends with .py, as a module; `name` is the reward's, for messages.

    Raises:
        InputError: there is none.
    """
    return _load_file(place, name, base) if place.endswith(".py") else _load_module(place, name)


def hint(word: object, known: Sequence[str]) -> str:
    """What a misspelt word may have meant, and all that is known."""
    close = difflib.get_close_matches(str(word), known, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known: {', '.join(known) or 'none'}"


def _load_module(module_name: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the user's module misses is that module's own error, not a wrong name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"reward {name!r}: no module {error.name!r}; check the name and PYTHONPATH") from None


def _load_file(place: str, name: str, base: str | Path | None) -> ModuleType:
    """Import a file once a process, under a module name made from its path."""
    tried = [(Path(folder) / Path(place).expanduser()).resolve() for folder in (base or ".", ".")]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise InputError(f"reward {name!r}: no file {' nor '.join(dict.fromkeys(map(str, tried)))}")
    module_name = f"{FILE_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None  # both are set for a path that ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def _address(function: RewardFn) -> str:
    place = function.__module__
    if place.startswith(FILE_MODULE):  # another process knows the file, not this name of it
        place = str(sys.modules[place].__file__)
    return f"{place}:{function.__qualname__}"
