"""GRPO steps of one trainer: seconds of generation and update, tokens a second, model-FLOP utilisation, memory."""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_parts.task import Task
from benchmarks.shapes import flops
from benchmarks.shared_prefix import compare, parse, settle, work
from frugalpath.doctor.machine import speed_of

IMPORTS = (
    "trl",
    "peft",
    "frugalpath.rl.trainer",
    "frugalpath.models.qwen_vl",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
)
PARTS = ("generate", "train_step", "step")


def run(task: Task) -> Iterator[dict[str, Any]]:
    """A line of the steps, and, where the other trainer ran before, one of how their first steps differ."""
    trainer = task.settings["trainer"]
    options = parse([*task.settings["options"], "--device", task.device, "--cores", str(task.cores)])
    home = task.folder / "steps" / task.settings["folder"]
    home.mkdir(parents=True, exist_ok=True)
    options.worker, options.folder = trainer, str(home)
    settle(options)
    if options.checkpointing is None:
        options.checkpointing = task.device == "cuda"
    found = work(options)
    yield described(task, options, found)
    kept = {name: home / f"{name}-first" for name in ("stock", "ours")}
    if all(folder.is_dir() for folder in kept.values()):
        yield {"case": "equality", "shape": task.settings["shape"], "image_tokens": options.image_tokens,
               **compare(kept["stock"], kept["ours"])}  # fmt: skip
        for folder in kept.values():
            shutil.rmtree(folder)


def described(task: Task, options: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a trainer's steps."""
    trainer = options.worker
    written = options.prompts * options.group * options.completion_tokens
    seconds = {part: statistics.median(found[part]) for part in PARTS}
    line: dict[str, Any] = {
        "case": "steps", "shape": task.settings["shape"], "trainer": trainer, "image_tokens": options.image_tokens,
        "attention": options.attention if trainer == "ours" else "sdpa", "n": len(found["step"]),
        "statistic": "median of steps",
    }  # fmt: skip
    for part in PARTS:
        line[f"{part}_seconds"] = round(seconds[part], 4)
        line[f"{part}_all"] = [round(s, 4) for s in found[part]]
        line[f"{part}_tokens_per_second"] = round(written / seconds[part], 1)
    if trainer == "ours":
        line["first_sight"] = {part: [round(s, 4) for s in found["first_sight"][part]] for part in PARTS}
    line |= mfu(task, options, found, seconds)
    shown = ("preset", "group", "prompts", "text_tokens", "completion_tokens", "dtype", "lora", "checkpointing")
    line["peak_gb"] = round(found["peak_gb"], 2)
    line["options"] = {key: getattr(options, key) for key in shown}
    return line


def mfu(
    task: Task, options: argparse.Namespace, found: dict[str, Any], seconds: dict[str, float]
) -> dict[str, float | None]:
    """Shares of a peak that the model's FLOPs take, of the update and the step; `hfu` counts repeated forwards too."""
    shared = options.worker == "ours"
    plain = copy.copy(options)
    plain.checkpointing = False
    useful, done = flops(plain, shared), flops(options, shared)
    dtype = options.dtype
    measured = [e[f"{dtype}_tflops"] for e in task.earlier.get("environment", []) if e.get("case") == "rates"]
    sheet = speed_of(found["device"]) if dtype == "bfloat16" else None
    peaks = {"measured": measured[0] * 1e12 if measured else None, "sheet": sheet.flops if sheet else None}
    out: dict[str, float | None] = {}
    for part in ("train_step", "step"):
        for peak, rate in peaks.items():
            for name, work_done in (("mfu", useful), ("hfu", done)):
                share = options.prompts * work_done[part] / seconds[part] / rate if rate else None
                out[f"{part}_{name}_{peak}"] = None if share is None else round(share, 4)
    return out
