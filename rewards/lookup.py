"""Reward functions by name: the registered ones, and those of modules and files, found alike in every process."""

from __future__ import annotations

import difflib
import importlib
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
from rewards.objectives import INSTEAD, REMOVED
from slides.errors import InputError, removed
from slides.user_code import FILE_MODULE, load_user_module

RewardFn = Callable[..., Any]
F = TypeVar("F", bound=RewardFn)

REMOVED_REWARDS = tuple(f"{preset}_cost" for preset in REMOVED)

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
        if name in REMOVED_REWARDS:
            raise InputError(removed(f"reward {name!r}", f"{INSTEAD} linear_cost; name that, or visionthink_cost"))
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
    return load_user_module(place, f"reward {name!r}", base)


def hint(word: object, known: Sequence[str]) -> str:
    """What a misspelt word may have meant, and all that is known."""
    close = difflib.get_close_matches(str(word), known, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known: {', '.join(known) or 'none'}"


def _address(function: RewardFn) -> str:
    place = function.__module__
    if place.startswith(FILE_MODULE):  # another process knows the file, not this name of it
        place = str(sys.modules[place].__file__)
    return f"{place}:{function.__qualname__}"
