"""Rewards of a recipe: callables in TRL's form that score in the process or in workers.

Rewards by name: from one line of a recipe to a callable in TRL's form.

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frugalpath.errors import InputError
from frugalpath.rewards import workers
from frugalpath.rewards.answer import ANSWER, END_ANSWER, END_THINK, SHAPING, THINK
from frugalpath.rewards.calling import (
    RewardError,
    RewardFn,
    RewardTimeout,
    Rows,
    find,
    hint,
    reward,
    reward_names,
    score,
    time_limit,
)
from frugalpath.rewards.workers import HERE_ONLY, WorkerError

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds for one batch, unless the spec says otherwise


@dataclass(frozen=True)
class Running:
    """Settings for running a reward.

    Args:
        timeout: seconds for one batch.
        workers: processes that score; 0 is the process of the trainer.
        on_error: what an exception or a timeout does: `raise` ends the run; `none` gives None for the rows that cause
            it, which are found row by row.
    """

    timeout: float = TIMEOUT
    workers: int = 0
    on_error: Literal["raise", "none"] = "raise"


class RewardFunction:
    """A reward of a recipe: a callable in TRL's form with a name, a weight and bound parameters.

    It can be pickled: the copy finds its function again by module or file.

    Attributes:
        weight: factor in the sum of rewards, for `GRPOConfig.reward_weights`.
        scores: whether it says that an answer is right; otherwise it shapes training only.
        running: where it runs, for how long, and what an error does.
        counts: completions so far, `{"scored": n, "none": n, "errors": n}`; `none` counts those that the reward does
            not apply to, `errors` those that got None for an exception or a timeout (`on_error: none`).
    """

    def __init__(
        self,
        name: str,
        source: str,
        function: RewardFn,
        params: dict[str, Any],
        weight: float = 1.0,
        running: Running | None = None,
        scores: bool = True,
    ):
        self.__name__ = name  # TRL logs rewards/<name>/mean
        self.weight = weight
        self.scores = scores
        self.params = params
        self.running = running or Running()
        self.counts = {"scored": 0, "none": 0, "errors": 0}
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

    @property
    def score_weight(self) -> float:
        """Weight in the score of an answer; 0 for what only shapes training, as a penalty does."""
        return max(self.weight, 0.0) if self.scores else 0.0

    def __repr__(self) -> str:
        return (
            f"RewardFunction({self.name!r}, source={self._source!r}, weight={self.weight}, scores={self.scores}, "
            f"params={self.params}, {self.running})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.name, self._source, self.params, self.weight, self.running, self.scores)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score a batch.

        Args:
            completions: n completions, strings or conversations.
            columns: one list of n values a column, as TRL passes them; `log_metric` gets the shares of None values and
                of errors, and the seconds of the call.

        Returns:
            n values; None where the reward does not apply to the row, and where it failed under `on_error: none`.

        Raises:
            RewardError: a column the function needs is missing, it took longer than `timeout`, or what it returned is
                not one finite number or None a completion. An exception inside the function is raised as it is. Under
                `on_error: none` exceptions and timeouts are not raised, the others are.
        """
        started = time.perf_counter()
        if missing := [column for column in self._required if column not in columns]:
            raise RewardError(
                f"reward {self.name!r} needs {', '.join(map(repr, missing))}, which is neither a column of the data "
                f"nor in its `params`; columns here: {', '.join(sorted(columns)) or 'none'}"
            )
        rows = Rows(completions, self._given(columns))
        failed: dict[int, Exception] = {}
        values = self._strict(rows) if self.running.on_error == "raise" else self._tolerant(rows, failed)
        none = values.count(None) - len(failed)
        self.counts["none"] += none
        self.counts["scored"] += len(values) - none - len(failed)
        if failed:
            self._report(failed, len(values))
        if values and (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"rewards/{self.name}/none", none / len(values))
            log_metric(f"rewards/{self.name}/errors", len(failed) / len(values))
            log_metric(f"rewards/{self.name}/seconds", time.perf_counter() - started)
        return values

    def _given(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns that the function asks for, and that can be had where it runs."""
        given = columns if self._takes_all else {c: columns[c] for c in self._columns if c in columns}
        if self.running.workers:
            left_out = {*workers.HERE_ONLY, *workers.IF_NAMED}.difference(self._columns)
            given = {c: value for c, value in given.items() if c not in left_out}
            for column in ("prompt", "prompts"):
                if column in given:
                    given[column] = workers.without_pictures(given[column])
        return given

    def _strict(self, rows: Rows) -> list[float | None]:
        values: list[float | None] = []
        for outcome in self._attempt(rows.parts(self.running.workers), self.running.timeout):
            if isinstance(outcome, Exception):
                raise outcome
            values += outcome
        return values

    def _tolerant(self, rows: Rows, failed: dict[int, Exception]) -> list[float | None]:
        """Values of the rows, None for those that fail, which are added to `failed`.

        The first try has half the time; what then failed is tried row by row in the other half, each row with an equal
        share of it, so that one row that hangs costs no other its value.
        """
        running, started = self.running, time.monotonic()
        values: list[float | None] = [None] * len(rows)
        parts = rows.parts(running.workers)
        again = []
        for part, outcome in zip(parts, self._attempt(parts, running.timeout / 2), strict=True):
            if isinstance(outcome, Exception) and len(part) > 1:
                again += part.parts(len(part))
            else:
                _put(part, outcome, values, failed)
        if again:
            left = max(running.timeout - (time.monotonic() - started), running.timeout / 4)
            limit = left / math.ceil(len(again) / max(1, running.workers))
            for row, outcome in zip(again, self._attempt(again, limit), strict=True):
                _put(row, outcome, values, failed)
        return values

    def _attempt(self, parts: Sequence[Rows], limit: float) -> list[workers.Outcome]:
        """Values of each part, or the exception that it ended with; a broken contract is raised."""
        if self.running.workers:
            outcomes = workers.attempt(self.running.workers, self.name, self._source, self.params, parts, limit)
        else:
            outcomes = [self._score_here(part, limit) for part in parts]
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                outcome.add_note(f"in reward {self.name!r} ({self._source})")
                if isinstance(outcome, RewardError) and not isinstance(outcome, RewardTimeout):
                    raise outcome
        return outcomes

    def _score_here(self, part: Rows, limit: float) -> workers.Outcome:
        try:
            with time_limit(limit, self.name, len(part)):
                return score(self.name, self._function, self.params, part)
        except Exception as error:  # raised again, or counted and logged
            return error

    def _report(self, failed: dict[int, Exception], n: int) -> None:
        first = not self.counts["errors"]
        self.counts["errors"] += len(failed)
        row, error = next(iter(failed.items()))
        logger.warning(
            "reward %r gives None for %d of %d completions, which ended in an error (%d so far); row %d of the batch: "
            "%s: %s%s",
            self.name,
            len(failed),
            n,
            self.counts["errors"],
            row,
            type(error).__name__,
            error,
            "; further tracebacks are not shown" if first else "",
            exc_info=error if first else None,
        )


def _put(part: Rows, outcome: workers.Outcome, values: list[float | None], failed: dict[int, Exception]) -> None:
    """Write the outcome of a part, one row if it failed, into the values of the batch."""
    if isinstance(outcome, Exception):
        failed[part.first] = outcome
    else:
        values[part.first : part.first + len(part)] = outcome


def _restore(
    name: str, source: str, params: dict[str, Any], weight: float, running: Running, scores: bool
) -> RewardFunction:
    return RewardFunction(name, source, find(source)[2], params, weight, running, scores)


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
    """Make the reward of one entry of a recipe's `rewards`.

    Args:
        spec: a name, or `{"name": name, "weight": 1.0, "scores": True, "params": {...}, "timeout": 60,
            "workers": 0, "on_error": "raise"}`. The name is a registered reward, `module:function`, or
            `path.py:function`; `scores` is false for those in `SHAPING`; the last three keys are those of `Running`.
        base: folder that a path is relative to (the recipe's); the current folder is tried after it.

    Raises:
        InputError: lists all problems of the entry.
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
    """Make all rewards of a recipe, in order; see `get_reward`.

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
    """Problems of a reward's signature and parameters."""
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
    """Problems that keep a reward from running in worker processes."""
    named = inspect.signature(function).parameters
    problems = [
        f"reward {name!r} asks for {argument!r}, which only the trainer's process has; remove it from the signature, "
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
