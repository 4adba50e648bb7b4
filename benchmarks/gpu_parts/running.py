"""Runs parts one after another, each in a process of its own, and writes what they find at once."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.plan import ROOT, Part
from benchmarks.gpu_parts.task import Task, die_with_parent, environment, kill_tree

DONE, FAILED, LATE, SKIPPED, ABSENT = "done", "failed", "over its limit", "no time left", "not run"
"""How a part ends; each has one line that says it, after the lines of what it measured."""
BAD = (FAILED, LATE)
SLOWER = 4.0
"""Limits of a rehearsal over those on a GPU: a CPU may have other work beside it."""
SHORT = 5.0
"""Seconds without which no part of a rehearsal is begun."""
SPARE = 5.0
"""Seconds kept at the end for the summary and for ending processes."""


class Lines:
    """The file of results: every line is on the disk before the next is measured."""

    def __init__(self, path: Path, common: dict[str, Any]):
        self.found: list[dict[str, Any]] = []
        self._path, self._common = path, common

    def add(self, part: str, status: str, **more: Any) -> None:
        """Append a line."""
        line = {"part": part, "status": status, **more, **self._common}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found.append(line)


class Worker:
    """A part's process, which imports and waits."""

    def __init__(self, part: Part, scratch: Path):
        self.part, self.log = part, scratch / f"{part.name}.log"
        self._read, pipe = os.pipe()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_parts.worker", part.module, str(pipe)],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[pipe],
                preexec_fn=die_with_parent,
            )
        os.close(pipe)

    def lines(self, task: Task, limit: float) -> Iterator[dict[str, Any]]:
        """What the part finds.

        Raises:
            TimeoutError: it takes longer than `limit` seconds; with the end of its log.
            RuntimeError: it failed; with the end of its log.
        """
        end, rest = time.monotonic() + limit, b""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # where importing failed; the status tells
            self.process.stdin.write(json.dumps(asdict(task)).encode() + b"\n")
            self.process.stdin.close()
        while True:
            ended = self.process.poll() is not None
            if select.select([self._read], [], [], 0 if ended else min(1.0, max(0.0, end - time.monotonic())))[0]:
                block = os.read(self._read, 1 << 16)
                *whole, rest = (rest + block).split(b"\n")
                yield from (json.loads(line) for line in whole)
                if block:
                    continue
                self.process.wait(10)  # nothing more comes: it is about to end
                break
            if ended:  # a process that it left behind keeps the pipe open
                break
            if time.monotonic() >= end:
                raise TimeoutError(self.end_of_log())
        if self.process.returncode:
            raise RuntimeError(f"status {self.process.returncode}: {self.end_of_log()}")

    def end_of_log(self) -> str:
        """Its last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])[-2000:]

    def stop(self) -> None:
        """End it and all that it started."""
        kill_tree(self.process.pid)
        with suppress(subprocess.TimeoutExpired):  # one that hangs in a driver cannot be ended; the others go on
            self.process.wait(10)
        os.close(self._read)


def run(
    parts: Sequence[Part], lines: Lines, out: Path, scratch: Path, seconds: float, rehearse: bool, commit: str | None
) -> None:
    """Run the parts that are possible within `seconds`; the log of each is appended to gpu.log when it ends."""
    deadline = time.monotonic() + seconds - SPARE
    able = [part for part in parts if part.missing(rehearse) is None]
    ready: Worker | None = None

    def left() -> float:
        return deadline - time.monotonic()

    try:
        for part in parts:
            if part not in able:
                lines.add(part.name, ABSENT, why=part.missing(rehearse))
                continue
            needed = SHORT if rehearse else part.seconds
            if left() < needed:
                lines.add(part.name, SKIPPED, why=f"{left():.0f} s were left, it takes about {needed:g}")
                continue
            if ready is not None and ready.part is not part:
                ready.stop()
                ready = None
            worker = ready or Worker(part, scratch)
            later = able[able.index(part) + 1 :]
            # What surely will not be reached in time need not be made ready.
            upcoming = next((p for p in later if rehearse or p.seconds < left()), None)
            ready = Worker(upcoming, scratch) if upcoming else None
            earlier: dict[str, list[dict[str, Any]]] = {}
            for line in lines.found:
                earlier.setdefault(line["part"], []).append(line)
            settings = part.small if rehearse else part.settings
            task = Task(settings, "cpu" if rehearse else "cuda", str(scratch), commit, earlier)
            try:
                _finish(worker, task, lines, part.limit * (SLOWER if rehearse else 1), left())
            finally:
                worker.stop()
                with open(out / "gpu.log", "a") as log:
                    log.write(f"===== {part.name}\n{worker.log.read_text(errors='replace')}\n")
                worker.log.unlink()
    finally:
        if ready is not None:
            ready.stop()


def _finish(worker: Worker, task: Task, lines: Lines, limit: float, left: float) -> None:
    """Write what a part finds within its limit and the seconds that are left, and how it ends."""
    part, start = worker.part, time.monotonic()
    status, more = DONE, {}
    try:
        for found in worker.lines(task, min(limit, left)):
            lines.add(part.name, "measured", **found)
    except TimeoutError as error:
        status, more = LATE, {"error": f"after {limit:g} s: {error}"}
        if left < limit:
            status, more = SKIPPED, {"why": f"{left:.0f} s were left, which did not suffice"}
    except RuntimeError as error:
        status, more = FAILED, {"error": str(error)}
    lines.add(part.name, status, seconds=round(time.monotonic() - start, 1), **more)
