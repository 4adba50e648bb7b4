"""A whole recipe from file to report: Qwen2.5-VL-3B's shape with random weights, on images of noise, in few steps."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.gpu_parts.plan import ROOT, SMALL
from benchmarks.gpu_parts.task import Task, command
from benchmarks.shared_prefix import build, parse, settle
from frugalpath.envs.boxes import boxes_text

IMPORTS = ("frugalpath.models.qwen_vl", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
RECIPE = "configs/recipes/qwen2_5_vl_3b.yaml"
SHORTER: dict[str, Any] = {"max_steps": 3, "max_completion_length": 32, "logging_steps": 1, "disable_tqdm": True,
                           "gold_rollout": True}  # fmt: skip
"""Of the GRPO stage; the batch, the ladder and the options of the recipe stay. Random weights write nothing that is
right, so that only a gold answer among the completions gives the update a gradient."""
SPLITS = {"train": 16, "val": 6, "test": 6}
"""Images of each split; two questions about each."""


def run(task: Task) -> Iterator[dict[str, Any]]:
    """One line: seconds by stage, and the device's memory in use at its highest."""
    home = task.folder / "recipe"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    start = time.perf_counter()
    preset = task.settings["preset"]
    performer = checkpoint(task, home / "model", preset)
    made = time.perf_counter() - start
    recipe = write_recipe(task, home, performer, small=preset == "small")
    watch = Memory(task.device)
    start = time.perf_counter()
    command([sys.executable, "-W", "ignore", "rl/grpo.py", "--config", str(recipe)])
    seconds, peak = time.perf_counter() - start, watch.stop()
    report = home / "run" / "report"
    summary = json.loads((report / "summary.json").read_text())
    steps = json.loads((home / "run" / "grpo" / "done.json").read_text())["log"]
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    yield {
        "case": "file to report",
        "recipe": RECIPE,
        "preset": preset,
        "make_checkpoint_seconds": round(made, 1),
        "run_seconds": round(seconds, 1),
        "stage_seconds": {name: round(s, 1) for name, s in summary["seconds"].items()},
        "used_gb": peak,
        "steps": sum("loss" in row for row in steps),
        "grad_norms": norms,
        "test_cases": 2 * SPLITS["test"],
        "report": sorted(p.name for p in report.iterdir() if p.is_file()),
        "shortened": {**SHORTER, "images": SPLITS},
    }
    shutil.rmtree(home)  # three times the weights
    if not norms or not all(0 < norm < float("inf") for norm in norms):
        raise RuntimeError(f"gradient norms of the GRPO steps: {norms}; there was nothing to learn, or too much")


def checkpoint(task: Task, folder: Path, preset: str) -> Path:
    """Folder of a model with random weights, its tokenizer and its processor."""
    shape = SMALL if preset == "small" else ["--preset", preset]
    options = parse([*shape, "--device", task.device, "--dtype", "bfloat16" if task.device == "cuda" else "float32"])
    options.worker, options.attention = "ours", "sdpa"
    settle(options)
    model, processor = build(options)
    model.save_pretrained(folder)
    # As published: images from 4 tokens on, of which the recipe's ladder stays above.
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 12845056}
    processor.save_pretrained(folder)
    del model
    gc.collect()
    if task.device == "cuda":
        torch.cuda.empty_cache()
    return folder


def write_recipe(task: Task, home: Path, performer: Path, small: bool) -> Path:
    """The recipe with cases of noise and fewer steps."""
    content = yaml.safe_load((ROOT / RECIPE).read_text())
    content |= SHORTER
    content |= {
        "output_dir": str(home / "run"),
        "cases": {"name": "manifest", "path": str(write_cases(home, 112 if small else 768))},
        "vision_cache": str(home / "vision"),
        "evaluation": {**content["evaluation"], "bootstrap": 50, "sft_continued": False},
    }
    content["performer"]["pretrained"] = str(performer)
    content["allocator"]["fit_epochs"] = 2
    content["sft"] = {**content["sft"], "max_steps": 3, "logging_steps": 1, "gradient_accumulation_steps": 1}
    if small:
        content |= {"ladder": [4, 9, 16], "allocator": {**content["allocator"], "look": [4]}, "bf16": False}
        content |= {"max_steps": 1, "use_cpu": True}
        content["sft"] |= {"max_steps": 1, "bf16": False}
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_cases(home: Path, side: int) -> Path:
    """Images of noise, and a choice and a box to be told of each."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in SPLITS.items():
        for at in range(count):
            file, dark = f"{split}-{at}.png", at % 2
            pixels = rng.integers(0, 128 if dark else 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / file, compress_level=1)
            shared = {"patient": f"{split}-{at}", "images": [file], "split": split}
            rows.append({**shared, "id": f"{file}-choice", "task": "choice", "options": ["dark", "light"],
                         "prompt": "Dark or light?", "answer": ("light", "dark")[dark]})  # fmt: skip
            rows.append({**shared, "id": f"{file}-boxes", "task": "detection", "prompt": "Give a box of the field.",
                         "answer": boxes_text([(100, 100, 900, 900)])})  # fmt: skip
    path = home / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Memory:
    """The highest use of the GPU's memory by all processes, looked at five times a second; None on a CPU."""

    def __init__(self, device: str):
        self._peak, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True) if device == "cuda" else None
        if self._thread:
            self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            self._peak = max(self._peak, total - free)

    def stop(self) -> float | None:
        """In GB."""
        if self._thread is None:
            return None
        self._over.set()
        self._thread.join()
        return round(self._peak / 1e9, 2)
