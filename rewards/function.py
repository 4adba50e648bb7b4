"""A reward as a recipe names it: a callable in TRL's form that scores in the process or in workers, and counts."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards import workers
from rewards.calling import RewardError, RewardTimeout, Rows, score, time_limit
from rewards.lookup import RewardFn, find

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds for one batch, unless the spec says otherwise


@dataclass(frozen=True)
class Running:
    """How a reward runs.

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
    """A reward as a recipe names it: a callable in TRL's form with a name, a weight and bound parameters.

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
