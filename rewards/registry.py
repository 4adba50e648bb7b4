"""Rewards by name: from one line of a recipe to a callable in TRL's form.

A reward is a plain function `fn(completions, **columns) -> list[float | None]`, one value a completion. It runs as it
is in stock TRL; `get_reward` adds what a recipe needs: a name for the logs, parameters and a weight, only the columns
that the function asks for, and errors that say which reward is wrong and how.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
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
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeVar

import numpy as np

import rewards
from rewards.answer import ANSWER, END_ANSWER, END_THINK, THINK
from slides.errors import InputError

logger = logging.getLogger(__name__)

# What a batch brings, from the case schema, the rollout and TRL; none of these can be set as a parameter.
CASE_COLUMNS = ("answer", "options", "task", "prompt", "id", "patient", "question", "protocol")
ROLLOUT_COLUMNS = ("budget", "tokens", "max_budget")
TRL_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
COLUMNS = frozenset(CASE_COLUMNS + ROLLOUT_COLUMNS + TRL_COLUMNS)
TIMEOUT = 60.0  # seconds for one batch, unless the spec says otherwise

RewardFn = Callable[..., Any]
F = TypeVar("F", bound=RewardFn)

_registered: dict[str, RewardFn] = {}


class RewardError(RuntimeError):
    """A reward function does not keep its contract: wrong number or type of values, a missing column, too slow."""


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


class RewardFunction:
    """A reward as a recipe names it: a callable in TRL's form with a name, a weight and bound parameters.

    It can be pickled: the copy finds its function again by module or file.

    Attributes:
        weight: factor in the sum of rewards, for `GRPOConfig.reward_weights`.
        counts: values given so far, `{"scored": n, "none": n}`; None means that the reward does not apply to the row.
    """

    def __init__(
        self, name: str, source: str, function: RewardFn, params: dict[str, Any], weight: float, timeout: float
    ):
        self.__name__ = name  # TRL logs rewards/<name>/mean
        self.weight = weight
        self.params = params
        self.timeout = timeout
        self.counts = {"scored": 0, "none": 0}
        self._source = source
        self._function = function
        arguments = inspect.signature(function).parameters.values()
        self._takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments)
        named = [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
        self._columns = [a.name for a in named if a.name not in params and a.name != "completions"]
        self._required = [a.name for a in named if a.default is a.empty and a.name in self._columns]

    @property
    def name(self) -> str:
        """The name in logs and tables."""
        return self.__name__

    def __repr__(self) -> str:
        return f"RewardFunction({self.name!r}, source={self._source!r}, weight={self.weight}, params={self.params})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, self._source, self.params, self.weight, self.timeout)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch.

        Args:
            completions: n completions, strings or conversations.
            columns: one list of n values a column, as TRL passes them; `log_metric` gets the share of None values.

        Returns:
            n values; None where the reward does not apply to the row.

        Raises:
            RewardError: a column the function needs is missing, it took longer than `timeout`, or what it returned is
                not one finite number or None a completion. An exception inside the function is raised as it is.
        """
        if missing := [column for column in self._required if column not in columns]:
            raise RewardError(
                f"reward {self.name!r} needs {', '.join(map(repr, missing))}, which is neither a column of the data "
                f"nor in its `params`; columns here: {', '.join(sorted(columns)) or 'none'}"
            )
        given = columns if self._takes_all else {c: columns[c] for c in self._columns if c in columns}
        try:
            with _time_limit(self.timeout, self.name):
                result = self._function(completions=completions, **{**given, **self.params})
                if inspect.iscoroutine(result):
                    result = asyncio.run(result)
        except Exception as error:
            error.add_note(f"in reward {self.name!r} ({self._source})")
            raise
        values = self._checked(result, len(completions))
        none = values.count(None)
        self.counts["none"] += none
        self.counts["scored"] += len(values) - none
        if values and (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"rewards/{self.name}/none", none / len(values))
        return values

    def _checked(self, result: Any, n: int) -> list[float | None]:
        values = result.tolist() if hasattr(result, "tolist") else result  # numpy arrays, torch tensors
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"reward {self.name!r} returned {type(result).__name__}; return a list, one value a completion"
            )
        if len(values) != n:
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} values for {n} completions; return one for each"
            )
        for i, value in enumerate(values):
            if value is None:
                continue
            if not isinstance(value, (numbers.Real, np.bool_)):
                raise RewardError(
                    f"reward {self.name!r} returned {type(value).__name__} {value!r:.80} for completion {i}; "
                    "return a number, or None where the reward does not apply"
                )
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {self.name!r} returned {value} for completion {i}; "
                    "return a finite number, or None where the reward does not apply"
                )
        return [None if value is None else float(value) for value in values]


def get_reward(spec: str | Mapping[str, Any], base: str | Path | None = None) -> RewardFunction:
    """The reward that one entry of a recipe's `rewards` names.

    Args:
        spec: a name, or `{"name": name, "weight": 1.0, "params": {...}, "timeout": 60}`. The name is a registered
            reward, `module:function`, or `path.py:function`. `timeout` is in seconds for one batch.
        base: folder that a path is relative to (the recipe's); the current folder is tried after it.

    Raises:
        InputError: with all that is wrong with the entry.
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise InputError(f"reward {spec!r}: write a name, or {{name: ..., weight: ..., params: {{...}}}}")
    name, params = spec["name"], spec.get("params")
    params = {} if params is None else params
    keys = ("name", "weight", "params", "timeout")
    problems = [f"reward {name!r}: unknown key {key!r}; {_hint(key, keys)}" for key in spec if key not in keys]
    weight, timeout = spec.get("weight", 1.0), spec.get("timeout", TIMEOUT)
    if not _is_number(weight):
        problems.append(f"reward {name!r}: `weight` is {weight!r}; give a finite number")
    if not _is_number(timeout) or timeout <= 0:
        problems.append(f"reward {name!r}: `timeout` is {timeout!r}; give a number of seconds above 0")
    if not isinstance(params, Mapping):
        problems.append(f"reward {name!r}: `params` is {params!r}; write {{parameter: value}}")
        params = {}
    try:
        short, source, function = _find(name, base)
    except InputError as error:
        raise InputError(problems + error.problems) from None
    problems += _param_problems(name, function, params)
    if problems:
        raise InputError(problems)
    return RewardFunction(short, source, function, dict(params), float(weight), float(timeout))


def get_rewards(specs: Sequence[str | Mapping[str, Any]], base: str | Path | None = None) -> list[RewardFunction]:
    """All rewards of a recipe, in order; see `get_reward`.

    Raises:
        InputError: with the problems of all entries; two rewards of one name could not be told apart in the logs.
    """
    found, problems = [], []
    for spec in specs:
        try:
            found.append(get_reward(spec, base))
        except InputError as error:
            problems += error.problems
    names = [entry.name for entry in found]
    problems += [f"reward {name!r} is named twice; keep one" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise InputError(problems)
    return found


def gold_completion(case_row: Mapping[str, Any]) -> str:
    """The completion that gives the row's gold answer in the required form; a list of boxes is written as JSON.

    Every reward must give 1.0 to it, on every row the reward applies to.
    """
    answer = case_row["answer"]
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return f"{THINK}{END_THINK}{ANSWER}{text}{END_ANSWER}"


def column(values: Sequence[Any] | None, n: int) -> Sequence[Any]:
    """A column of the batch, or n times None where the data has no such column."""
    return [None] * n if values is None else values


@functools.lru_cache(maxsize=4096)
def warn_unscorable(reward_name: str, row_id: str, problem: str) -> None:
    """Log, once a row, that a row's own data keep it from being scored; the reward gives None for it."""
    logger.warning("reward %r gives None for row %s: %s", reward_name, row_id, problem)


def _find(name: str, base: str | Path | None = None) -> tuple[str, str, RewardFn]:
    """Name for the logs, address that finds the function again in another process, and the function."""
    place, separator, function_name = name.rpartition(":")
    if not separator:
        names = reward_names()
        if name not in names:
            raise InputError(
                f"unknown reward {name!r}; {_hint(name, names)}. A function of your own is named as 'module:function' "
                "or 'path.py:function'"
            )
        return name, _address(_registered[name]), _registered[name]
    module = _load_file(place, name, base) if place.endswith(".py") else _load_module(place, name)
    try:
        function = operator.attrgetter(function_name)(module)
    except AttributeError:
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(f"reward {name!r}: no {function_name!r} in {place}; {_hint(function_name, names)}") from None
    if not callable(function):
        raise InputError(f"reward {name!r}: {function_name!r} in {place} is not a function")
    return function_name, f"{module.__file__ if place.endswith('.py') else place}:{function_name}", function


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
    module_name = f"user_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
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


def _restore(name: str, source: str, params: dict[str, Any], weight: float, timeout: float) -> RewardFunction:
    return RewardFunction(name, source, _find(source)[2], params, weight, timeout)


def _address(function: RewardFn) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _param_problems(name: str, function: RewardFn, params: Mapping[str, Any]) -> list[str]:
    """What is wrong with a reward's signature and with the parameters given for it."""
    arguments = inspect.signature(function).parameters.values()
    named = [a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
    if "completions" not in named and not any(a.kind is a.VAR_KEYWORD for a in arguments):
        return [
            f"reward {name!r} does not take `completions`; write def {name.rpartition(':')[2]}(completions, **columns)"
        ]
    problems = []
    known = [a for a in named if a not in COLUMNS]
    for key in params:
        if key in COLUMNS:
            problems.append(f"reward {name!r}: {key!r} is a column of the data and cannot be set in `params`")
        elif key not in known:  # **columns would swallow a misspelt name, so it does not make a name known
            problems.append(f"reward {name!r} has no parameter {key!r}; {_hint(key, known)}")
    return problems


def _hint(word: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return f"{suggestion}known: {', '.join(known) or 'none'}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@contextmanager
def _time_limit(seconds: float, name: str) -> Iterator[None]:
    """Raise RewardError in the block after `seconds`.

    By a timer signal, which also stops a runaway regular expression. Python delivers signals to the main thread only,
    and Windows has no timer signal: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise RewardError(
            f"reward {name!r} took longer than {seconds:g} s for one batch; make it faster or set `timeout`"
        )

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
