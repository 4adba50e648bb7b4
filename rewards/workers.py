"""Run reward functions in worker processes that live for the run and are stopped when they hang.

Pebble's pool stops one hung or dead worker and leaves the others at work. Loky's way to start a process neither forks
a process in which torch has started threads nor imports the training script again, so a worker holds the rewards and
what they import, nothing else. https://pebble.readthedocs.io, https://loky.readthedocs.io
"""

from __future__ import annotations

import atexit
import faulthandler
import logging
import math
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loky.backend.context import get_context
from pebble import ProcessExpired, ProcessPool

from frugalpath.rewards.calling import RewardError, RewardTimeout, Rows, find, load, score

logger = logging.getLogger(__name__)

START = 300.0  # seconds for workers to start, with what their reward imports
GRACE = 5.0  # seconds over its limit after which a worker ends itself: nobody is left to stop it

HERE_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")
"""Arguments that are bound to the process of the trainer."""
IF_NAMED = ("prompt", "prompts", "completion_ids", "image", "images")
"""Large columns that `**columns` does not bring to a worker; a function that wants one names it."""

Outcome = list[float | None] | Exception

_pools: dict[tuple[int, str, int], ProcessPool] = {}
_lock = threading.Lock()


class WorkerError(RuntimeError):
    """A worker process died, or raised an exception that cannot be handed over as it is."""


def attempt(
    workers: int, name: str, source: str, params: Mapping[str, Any], parts: Sequence[Rows], limit: float
) -> list[Outcome]:
    """Score parts of a batch in worker processes.

    Args:
        workers: number of processes; rewards of one module or file with the same number share them.
        name: of the reward, for messages. source: of its function, as `find` gives it. params: of the function.
        parts: each is one call. limit: seconds for each call; the start of workers does not count.

    Returns:
        For each part its values, or the exception that it raised; RewardTimeout when its worker was stopped.

    Raises:
        RewardError: a column cannot be pickled, or the workers do not start.
    """
    payloads = [_payload(name, params, part) for part in parts]
    pool = _pool(source.rpartition(":")[0], workers)
    futures: list[Future] = []
    try:
        for payload in payloads:
            futures.append(_schedule(pool, limit, name, source, payload, limit + GRACE))
        wait(futures, limit * math.ceil(len(parts) / workers) + START)
        if not all(future.done() for future in futures):
            raise RewardError(
                f"reward {name!r}: no worker process took a part of the batch within {START:g} s; call the function "
                f"in a process of its own (python -c 'import ...') to see what keeps it from starting"
            )
        return [_outcome(future, name, limit, part) for future, part in zip(futures, parts, strict=True)]
    finally:
        for future in futures:
            if not future.done():
                future.cancel()  # stops the worker that has it


def stop() -> None:
    """Stop all workers of this process; a later call of a reward starts new ones."""
    with _lock:
        for key in [key for key in _pools if key[0] == os.getpid()]:  # a forked child leaves its parent's alone
            _stop_pool(_pools.pop(key))


# Pebble stops the workers at exit too, but its own threads may start new ones meanwhile; this comes before it.
atexit.register(stop)


def without_pictures(prompts: Iterable[Any]) -> list[Any]:
    """Prompts whose conversations keep the text and the place of pictures but not the pictures."""
    done: dict[int, Any] = {}  # the completions of a group share one prompt, which is then pickled once
    prompts = list(prompts)
    for prompt in prompts:
        if id(prompt) not in done:
            done[id(prompt)] = _without_pictures(prompt)
    return [done[id(prompt)] for prompt in prompts]


def _without_pictures(prompt: Any) -> Any:
    if not isinstance(prompt, list):
        return prompt
    return [{**m, "content": _text_parts(m["content"])} if isinstance(m, dict) else m for m in prompt]


def _text_parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [{k: part[k] for k in ("type", "text") if k in part} for part in content]


def _pool(place: str, workers: int) -> ProcessPool:
    key = (os.getpid(), place, workers)
    with _lock:
        pool = _pools.get(key)
        if pool is not None and not pool.active:
            logger.warning("worker processes of %s died while they were idle; new ones are started", place)
            _stop_pool(pool)
            pool = None
        if pool is None:
            pool = ProcessPool(workers, initializer=_start, initargs=(place,), context=get_context("loky"))
            _pools[key] = pool
        return pool


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _payload(name: str, params: Mapping[str, Any], part: Rows) -> bytes:
    # Plain pickle: the pool's own would hand tensors over in shared memory, which lives and dies with a process.
    try:
        return pickle.dumps((params, part))
    except Exception as error:
        for column, value in {"completions": part.completions, **part.columns}.items():
            try:
                pickle.dumps(value)
            except Exception:
                raise RewardError(
                    f"reward {name!r}: column {column!r} cannot be handed to a worker process ({error}); "
                    "leave it out of the signature, or set `workers: 0`"
                ) from error
        raise


def _schedule(pool: ProcessPool, limit: float, *args: Any) -> Future:
    try:
        return pool.schedule(_work, args, timeout=limit)
    except RuntimeError as error:  # all workers have just died
        broken: Future = Future()
        broken.set_exception(BrokenProcessPool(str(error)))
        return broken


def _outcome(future: Future, name: str, limit: float, part: Rows) -> Outcome:
    n = len(part)
    try:
        result = future.result()
    except TimeoutError:
        return RewardTimeout.of(name, limit, n)
    except (ProcessExpired, BrokenProcessPool) as error:
        code = getattr(error, "exitcode", None)
        return WorkerError(
            f"a worker process of reward {name!r} died{'' if code is None else f' (exit code {code})'} on "
            f"{n} completion{'s' * (n != 1)} from row {part.first} of the batch; too little memory (exit code -9), a "
            "crash in C (-11) and os._exit do that; `on_error: none` gives None for the rows where it happens"
        )
    return result.exception() if isinstance(result, _Failure) else result


# What follows runs in a worker.


@dataclass(frozen=True)
class _Failure:
    """An exception on its way out of a worker: as it is if it can be pickled, and in words."""

    pickled: bytes | None
    summary: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        pickled = None
        with suppress(Exception):
            pickled = pickle.dumps(error)
        return cls(pickled, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))

    def exception(self) -> Exception:
        error = None
        if self.pickled is not None:
            with suppress(Exception):  # many classes of exceptions can be pickled but not read again
                error = pickle.loads(self.pickled)
        if not isinstance(error, Exception):
            error = WorkerError(self.summary)
        error.add_note(f"in a worker process:\n{self.trace}")
        return error


def _start(place: str) -> None:
    """Once a worker: import the module or file of its rewards, outside any reward's time limit."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would wait for code that hangs in C
    with suppress(Exception):  # the first call meets the same error and reports it
        load(place, place)


def _work(name: str, source: str, payload: bytes, lifetime: float) -> list[float | None] | _Failure:
    """Score one part. A worker whose parent was killed while it hung ends by itself after `lifetime` seconds."""
    faulthandler.dump_traceback_later(lifetime, exit=True)
    try:
        try:
            _, _, function = find(source)
            params, part = pickle.loads(payload)
        except Exception as error:
            raise RewardError(f"reward {name!r} ({source}) cannot run in a worker process: {error}") from error
        return score(name, function, params, part)
    except Exception as error:
        return _Failure.of(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
