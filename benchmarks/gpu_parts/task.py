"""What a part is told, and processes that end with the one that started them."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PDEATHSIG, SUBREAPER = 1, 36
"""Numbers of `prctl` (Linux)."""
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b")
"""The line of a traceback that tells what was raised."""


@dataclass
class Task:
    """A part's orders.

    Args:
        settings: of the plan. device: "cuda" or "cpu". scratch: folder shared by all parts of a run.
        commit: of this code. earlier: lines that parts before it gave, by part.
    """

    settings: dict[str, Any]
    device: str
    scratch: str
    commit: str | None = None
    earlier: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The scratch folder."""
        return Path(self.scratch)

    @property
    def cores(self) -> int:
        """CPU cores to use."""
        return min(16, os.cpu_count() or 1) if self.device == "cuda" else 1


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process; nothing where there is no `prctl`."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """SIGKILL for this process when the one that started it ends, however it ends. Kept over exec, not over fork."""
    prctl(PDEATHSIG, signal.SIGKILL)


def kill_tree(pid: int, itself: bool = True) -> None:
    """Kill a process's descendants, and the process; what hangs in a driver is left."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for _ in range(10):  # one that is killed may just have started another
            children = [process for process in root.children(recursive=True) if _alive(process)]
            if not children:
                break
            for process in children:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(children, timeout=0.2)
        if itself:
            root.kill()


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def lead() -> None:
    """Make this process, which starts others, take them along when its own parent ends.

    A process that is killed takes nobody along, so it asks for SIGTERM instead; orphans become its own children.
    """

    def end(number: int, frame: Any) -> None:
        kill_tree(os.getpid(), itself=False)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    prctl(SUBREAPER, 1)
    prctl(PDEATHSIG, signal.SIGTERM)


def environment() -> dict[str, str]:
    """Of a command that a part runs: nothing is looked up on a hub."""
    from benchmarks.gpu_parts.plan import ROOT

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def command(arguments: list[str], merged: bool = True) -> str:
    """Run a command to its end; what it wrote to stdout, which the log has too.

    Args:
        merged: what it wrote to stderr is wanted with it.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    from benchmarks.gpu_parts.plan import ROOT

    lead()
    lines: list[str] = []
    with subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merged else None,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        # Launchers write much after the error that counts, which is the last but theirs.
        causes = [line for line in lines if RAISED.match(line) and "ChildFailedError" not in line]
        told = causes[-1:] or lines[-10:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}: {''.join(told).strip()}")
    return "".join(lines)
