"""Card, driver and versions, and the rates that the card reaches here."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu_parts.task import Task
from benchmarks.measure import machine, timed
from frugalpath.doctor.machine import speed_of
from frugalpath.models.vision_tower import takes_features

IMPORTS = ("transformers", "trl", "peft")
PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "triton", "deepspeed", "vllm",
    "flash_attn",
)  # fmt: skip


def run(task: Task) -> Iterator[dict[str, Any]]:
    """Facts first, then rates, so that a card that fails at once is known by name."""
    from transformers import Qwen2_5_VLModel

    cuda = task.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --rehearse runs everything in small on a CPU")
    facts: dict[str, Any] = {"case": "facts", **machine(task.device)}
    facts["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    facts |= {"date": datetime.now(UTC).date().isoformat(), "commit": task.commit}
    facts["versions"] = {"python": platform.python_version()} | {n: v for n in PACKAGES if (v := _version(n))}
    facts["tower_sees_once"] = takes_features(Qwen2_5_VLModel.__new__(Qwen2_5_VLModel))
    if cuda:
        about = torch.cuda.get_device_properties(0)
        facts |= {
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "gpu_memory_gb": round(about.total_memory / 1e9, 1),
            "gpu_free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
            "capability": list(torch.cuda.get_device_capability()),
            "sheet_tflops": sheet.flops / 1e12 if (sheet := speed_of(facts["device"])) else None,
        }
    yield facts
    size, seconds = task.settings["size"], task.settings["seconds"]
    rates: dict[str, Any] = {"case": "rates", "size": size}
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(size, size, device=task.device, dtype=dtype) for _ in range(2))
        rates[f"{str(dtype)[6:]}_tflops"] = rate(lambda a=left, b=right: a @ b, task.device, seconds, 2 * size**3)
    block = torch.empty(2**30 if cuda else 2**22, dtype=torch.uint8, device=task.device)
    target = torch.empty_like(block)
    copied = rate(lambda: target.copy_(block), task.device, seconds / 4, 2 * block.numel())
    yield {**rates, "copy_tb": copied}


def rate(work: Any, device: str, seconds: float, each: float) -> float:
    """Tera-units a second of calls that do `each`; on a GPU they are queued, and the queue is waited for."""
    timed(work, device, 3, 60.0)  # the first ones choose kernels
    once = min(timed(work, device, 3, 60.0))
    count = max(3, round(seconds / max(once, 1e-9)))

    def queue() -> None:
        for _ in range(count):
            work()

    start = time.perf_counter()
    timed(queue, device, 1, 60.0)
    return round(count * each / (time.perf_counter() - start) / 1e12, 4)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0] or None
