"""Packed rows against TRL's repeated ones: log-probabilities and gradients of the first step, by precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.task import Task
from benchmarks.shared_prefix import compare, parse, settle, work

IMPORTS = ("trl", "peft", "frugalpath.rl.trainer", "frugalpath.models.qwen_vl")
LIMITS = {"max_logp_diff": 1e-4, "max_grad_rel_diff": 1e-3}
"""What float32 may differ by; above it the results are not the same."""
ROUNDING = 2.0
"""In bfloat16 ours may be so many times as far from TRL's float32 as TRL's own bfloat16 is."""


def run(task: Task) -> Iterator[dict[str, Any]]:
    """A line for each precision; the part fails where they are not the same."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    attention = task.settings["attention"]
    problems = []
    truth = first(task, "stock", "float32", "sdpa")
    for dtype in ("float32", "bfloat16"):
        stock = first(task, "stock", dtype, "sdpa")
        own = first(task, "ours", dtype, attention)
        found: dict[str, Any] = {"case": f"{dtype} {attention}", "dtype": dtype, "attention": attention}
        found |= compare(stock, own)
        if dtype == "float32":
            problems += [f"float32: {key} {found[key]:.2g}" for key, most in LIMITS.items() if not found[key] <= most]
        else:
            # Both against the same truth, as rounding alone sets two bfloat16 runs apart.
            errors = {"stock": compare(truth, stock), "ours": compare(truth, own)}
            for name, error in errors.items():
                found[f"{name}_from_float32"] = error
            ours, theirs = (errors[name]["mean_logp_diff"] for name in ("ours", "stock"))
            if not ours <= ROUNDING * theirs:
                problems.append(f"bfloat16: ours is {ours:.2g} from float32 in the mean, TRL {theirs:.2g}")
        yield found
    if problems:
        raise RuntimeError(f"not the same as TRL with {attention}: {'; '.join(problems)}")


def first(task: Task, trainer: str, dtype: str, attention: str) -> Path:
    """Folder of what a trainer's first step had; it is kept for the parts that come later."""
    folder = task.folder / "exactness" / f"{dtype}_{attention}"
    kept = folder / f"{trainer}-first"
    if not kept.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [*task.settings["options"], "--device", task.device, "--dtype", dtype, "--attention", attention]
        options = parse([*arguments, "--steps", "1", "--cores", str(task.cores)])
        options.worker, options.folder, options.checkpointing = trainer, str(folder), False
        settle(options)
        work(options)
    return kept
