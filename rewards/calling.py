"""Reward functions by name: the registered ones, and those of modules and files, found alike in every process.

One call of a reward function on some rows of a batch: its time limit and the check of what it returns.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import math
import numbers
import operator
import pkgutil
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeVar

import numpy as np

from frugalpath import rewards
from frugalpath.errors import InputError, removed
from frugalpath.rewards.cost import INSTEAD, REMOVED
from frugalpath.user_code import FILE_MODULE, load_user_module

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
        importlib.import_module(f"{rewards.__name__}.{module.name}")
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
    """Suggest the closest known word, and list all."""
    close = difflib.get_close_matches(str(word), known, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known: {', '.join(known) or 'none'}"


def _address(function: RewardFn) -> str:
    place = function.__module__
    if place.startswith(FILE_MODULE):  # another process knows the file, not this name of it
        place = str(sys.modules[place].__file__)
    return f"{place}:{function.__qualname__}"


class RewardError(InputError):
    """A reward function violates its contract: wrong number or type of values, a missing column, too slow.

    The user has to fix the function, so a command reports it in one line without a traceback.
    """


class RewardTimeout(RewardError):
    """A reward function took longer than its `timeout`."""

    @classmethod
    def of(cls, name: str, seconds: float, n: int) -> RewardTimeout:
        """With the reward, its limit and the remedy; n completions were scored in one call."""
        return cls(
            f"reward {name!r} took longer than {seconds:.3g} s for {n} completion{'s' * (n != 1)}; make it faster, "
            "raise `timeout` (seconds for one batch) or score in parallel with `workers`"
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a batch that are scored in one call.

    Args:
        completions: n completions.
        columns: by name; a column is a sequence of n values, anything else belongs to the batch as a whole.
        first: place of the first row in the batch.
    """

    completions: Sequence[Any]
    columns: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0

    def __len__(self) -> int:
        return len(self.completions)

    def parts(self, k: int) -> list[Rows]:
        """The rows in order, in k parts of equal size to within one; fewer when there are fewer rows, at least one."""
        n, k = len(self), max(1, min(k, len(self)))
        if k == 1:
            return [self]
        cuts = [n * i // k for i in range(k + 1)]
        return [
            Rows(
                self.completions[a:b],
                {key: value[a:b] if _is_column(value, n) else value for key, value in self.columns.items()},
                self.first + a,
            )
            for a, b in pairwise(cuts)
        ]


def _is_column(value: Any, n: int) -> bool:
    sliced = (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, Mapping))
    )
    return sliced and len(value) == n


def score(name: str, function: RewardFn, params: Mapping[str, Any], rows: Rows) -> list[float | None]:
    """Values of the rows, one each.

    Raises:
        RewardError: the function did not return one finite number or None for each row; an exception inside the
            function is raised as it is.
    """
    result = function(completions=rows.completions, **{**rows.columns, **params})
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return _checked(name, result, rows)


def _checked(name: str, result: Any, rows: Rows) -> list[float | None]:
    values = result.tolist() if hasattr(result, "tolist") else result  # numpy arrays, torch tensors
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"reward {name!r} returned {type(result).__name__}; return a list with one value per completion"
        )
    if len(values) != len(rows):
        raise RewardError(
            f"reward {name!r} returned {len(values)} values for {len(rows)} completions; return one for each"
        )
    for i, value in enumerate(values, rows.first):
        if value is None:
            continue
        if not isinstance(value, (numbers.Real, np.bool_)):
            raise RewardError(
                f"reward {name!r} returned {type(value).__name__} {value!r:.80} for completion {i}; "
                "return a number, or None where the reward does not apply"
            )
        if not math.isfinite(value):
            raise RewardError(
                f"reward {name!r} returned {value} for completion {i}; "
                "return a finite number, or None where the reward does not apply"
            )
    return [None if value is None else float(value) for value in values]


@contextmanager
def time_limit(seconds: float, name: str, n: int) -> Iterator[None]:
    """Raise RewardTimeout in the block after `seconds`; n completions are scored in it.

    By a timer signal, which also stops a runaway regular expression, but not other code that hangs in C. Python
    delivers signals to the main thread only, and Windows has no timer signal: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    fired = False

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal fired
        fired = True
        raise RewardTimeout.of(name, seconds, n)

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:  # a timer that ran before us, such as that of a reward that calls another, goes on
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))
    if fired:  # the function took our exception for one of its own
        raise RewardTimeout.of(name, seconds, n)
