"""What the benchmarks share: workers in processes of their own, clocks, peak memory, and how busy the machine is."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

MARK = "RESULT "


def settle(options: argparse.Namespace) -> None:
    """Fill in `device` and `dtype`, and keep this process and its workers to `cores` of the CPU."""
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if hasattr(os, "sched_setaffinity") and options.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])


def run_worker(script: str, arguments: Sequence[str], name: str) -> dict[str, Any]:
    """Run a script as a worker; what it gave to `give`.

    Raises:
        SystemExit: it failed; the end of what it wrote to stderr.
    """
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    return json.loads(lines[0][len(MARK) :])


def give(result: dict[str, Any]) -> None:
    """Hand a worker's result to `run_worker`."""
    print(MARK + json.dumps(result))


class Others:
    """The fraction of all cores' time that other processes take, from now on."""

    def __init__(self) -> None:
        self._before = self._now()

    def busy(self) -> float:
        """It, as a share of all cores, this process's workers excluded."""
        worked, own, wall = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return round(max(0.0, worked - own) / (wall * (os.cpu_count() or 1)), 3)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds that all cores worked, that finished workers did, and that passed."""
        times = psutil.cpu_times(percpu=True)
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked = sum(sum(t) - t.idle - getattr(t, "iowait", 0.0) for t in times)
        return worked, own.ru_utime + own.ru_stime, time.perf_counter()


class Peak:
    """Peak memory in bytes: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def reset(self) -> int:
        """Begin anew; what is in use now. Only Linux can forget a process's peak; elsewhere it stays the highest."""
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):  # of glibc: what was freed goes back to the system
                libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        return psutil.Process().memory_info().rss

    def read(self) -> int:
        """The peak since."""
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.is_file():  # the peak of getrusage begins at that of the process that started this one
            return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def timed(call: Callable[[], Any], device: str, repeats: int, limit: float) -> list[float]:
    """Seconds of each of `repeats` calls; no further one begins after `limit` seconds."""
    import torch

    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < limit):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def versions(*modules: ModuleType) -> dict[str, str]:
    """Versions of Python and of modules."""
    return {"python": platform.python_version()} | {m.__name__: m.__version__ for m in modules}


def machine(device: str) -> dict[str, Any]:
    """The processor, its cores, the memory, and the GPU if it is used."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.system(),
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})
