"""Rewards by name: from one line of a recipe to a callable in TRL's form.

A reward is a plain function `fn(completions, **columns) -> list[float | None]`, one value a completion. It runs as it
is in stock TRL; `get_reward` adds what a recipe needs: a name for the logs, parameters and a weight, only the columns
that the function asks for, and errors that say which reward is wrong and how.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.answer import ANSWER, END_ANSWER, END_THINK, SHAPING, THINK
from rewards.calling import RewardError, RewardTimeout
from rewards.function import TIMEOUT, RewardFunction, Running
from rewards.lookup import RewardFn, find, hint, reward, reward_names
from rewards.workers import HERE_ONLY, WorkerError
from slides.errors import InputError

__all__ = [
    "RewardError", "RewardFunction", "RewardTimeout", "WorkerError", "column", "get_reward", "get_rewards",
    "gold_completion", "reward", "reward_names", "warn_unscorable",
]  # fmt: skip

logger = logging.getLogger(__name__)

# What a batch brings, from the case schema, the rollout and TRL; none of these can be set as a parameter.
CASE_COLUMNS = ("answer", "options", "task", "prompt", "id", "patient", "question", "protocol")
ROLLOUT_COLUMNS = ("budget", "tokens", "max_budget")
TRL_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
COLUMNS = frozenset(CASE_COLUMNS + ROLLOUT_COLUMNS + TRL_COLUMNS)
KEYS = ("name", "weight", "scores", "params", "timeout", "workers", "on_error")


def get_reward(spec: str | Mapping[str, Any], base: str | Path | None = None) -> RewardFunction:
    """The reward that one entry of a recipe's `rewards` names.

    Args:
        spec: a name, or `{"name": name, "weight": 1.0, "scores": True, "params": {...}, "timeout": 60,
            "workers": 0, "on_error": "raise"}`. The name is a registered reward, `module:function`, or
            `path.py:function`; `scores` is false for those in `SHAPING`; the last three keys are those of `Running`.
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
    problems = [f"reward {name!r}: unknown key {key!r}; {hint(key, KEYS)}" for key in spec if key not in KEYS]
    weight, timeout = spec.get("weight", 1.0), spec.get("timeout", TIMEOUT)
    if not _is_number(weight):
        problems.append(f"reward {name!r}: `weight` is {weight!r}; give a finite number")
    if not _is_number(timeout) or timeout <= 0:
        problems.append(f"reward {name!r}: `timeout` is {timeout!r}; give a number of seconds above 0")
    workers, on_error = spec.get("workers", 0), spec.get("on_error", "raise")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 0:
        problems.append(f"reward {name!r}: `workers` is {workers!r}; give a number of processes, 0 for none")
        workers = 0
    if on_error not in ("raise", "none"):
        problems.append(f"reward {name!r}: `on_error` is {on_error!r}; write raise or none")
    if "scores" in spec and not isinstance(spec["scores"], bool):
        problems.append(f"reward {name!r}: `scores` is {spec['scores']!r}; write true, or false where it only shapes")
    if not isinstance(params, Mapping):
        problems.append(f"reward {name!r}: `params` is {params!r}; write {{parameter: value}}")
        params = {}
    try:
        short, source, function = find(name, base)
    except InputError as error:
        raise InputError(problems + error.problems) from None
    problems += _param_problems(name, function, params)
    if workers:
        problems += _worker_problems(name, source, function)
    if problems:
        raise InputError(problems)
    running = Running(float(timeout), workers, on_error)
    scores = spec.get("scores", short not in SHAPING)
    return RewardFunction(short, source, function, dict(params), float(weight), running, scores)


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
            problems.append(f"reward {name!r} has no parameter {key!r}; {hint(key, known)}")
    return problems


def _worker_problems(name: str, source: str, function: RewardFn) -> list[str]:
    """What keeps a reward from running in worker processes."""
    named = inspect.signature(function).parameters
    problems = [
        f"reward {name!r} asks for {argument!r}, which only the trainer's process has; take it out of the signature, "
        "or set `workers: 0`"
        for argument in HERE_ONLY
        if argument in named
    ]
    place, _, qualified = source.rpartition(":")
    if place == "__main__" or "<" in qualified:
        problems.append(
            f"reward {name!r}: a worker process cannot find {source}; move the function to the top level of a file of "
            "its own and name it as 'path.py:function', or set `workers: 0`"
        )
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
