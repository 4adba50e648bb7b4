"""One call of a reward function on some rows of a batch: its time limit and the check of what it returns."""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from rewards.lookup import RewardFn
from slides.errors import InputError


class RewardError(InputError):
    """A reward function does not keep its contract: wrong number or type of values, a missing column, too slow.

    The function is the user's to mend, so that an entry tells it in a line, without our traceback.
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
        raise RewardError(f"reward {name!r} returned {type(result).__name__}; return a list, one value a completion")
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
