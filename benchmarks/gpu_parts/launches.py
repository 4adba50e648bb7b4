"""Launch files with one process: the losses of a run under ZeRO-3 or FSDP2 against those of a plain run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from benchmarks.gpu_parts.task import Task, command

LIMIT = 1e-3
"""What the losses of the supervised steps may differ by, relatively: both are float32."""
RECIPE: dict[str, Any] = {
    "performer": {
        "family": "qwen_vl", "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab_size": 300,
        "lora": {"r": 4, "lora_alpha": 8}, "show_options": False,
    },
    "ladder": [4, 9],
    "encoder": {"field_side": 96},
    "allocator": {"look": [4], "width": 16, "fit_epochs": 1},
    "rewards": ["choice", {"name": "format", "weight": 0.2}],
    "sft": {
        "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1,
    },
    "evaluation": {"bootstrap": 20, "sft_continued": False, "linear_probe": False},
    "budgets_per_image": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 8,
    # The gold answer is there to learn from, and what is likeliest is the same in both runs.
    "gold_rollout": True,
    "generation_kwargs": {"do_sample": False},
    "max_completion_length": 16,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip


def run(task: Task) -> Iterator[dict[str, Any]]:
    """One line: how losses and gradient norms differ from the plain run's."""
    home, name = task.folder / "launches", task.settings["config"]
    plain = logs(task, home, "one_gpu")
    own = logs(task, home, name)
    found: dict[str, Any] = {"case": name, "processes": 1}
    for stage in ("sft", "grpo"):
        for key in ("loss", "grad_norm"):
            pairs = [(a[key], b[key]) for a, b in zip(plain[stage], own[stage], strict=True) if key in a]
            found[f"{stage}_{key}_rel_diff"] = max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)
    yield found
    if not found["sft_loss_rel_diff"] <= LIMIT:
        raise RuntimeError(f"{name}: supervised losses differ by {found['sft_loss_rel_diff']:.2g} from a plain run's")


def logs(task: Task, home: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """What the stages of a launch logged; it is not run again where it has run."""
    folder = home / name
    done = {stage: folder / "run" / stage / "done.json" for stage in ("sft", "grpo")}
    if not done["grpo"].is_file():
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        content = {"output_dir": str(folder / "run"), "cases": {"name": "manifest", "path": str(cases(folder))}}
        recipe.write_text(yaml.safe_dump({**RECIPE, **content}))
        # Accelerate shares weights out on accelerators only; the script of the tests lets it take CPUs.
        entry = ["rl/grpo.py", "--config"] if task.device == "cuda" else ["tests/launch/worker.py"]
        launch = ["--config_file", f"configs/accelerate/{name}.yaml", "--num_processes", "1"]
        launch += ["--main_process_port", "0"]
        command([sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", *launch, *entry, str(recipe)])
    return {
        stage: [row for row in json.loads(path.read_text())["log"] if "loss" in row] for stage, path in done.items()
    }


def cases(folder: Path) -> Path:
    """Questions about 16 small images."""
    rng, rows = np.random.default_rng(0), []
    for at in range(16):
        dark = at % 2
        pixels = rng.integers(0, 128 if dark else 255, (84, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{at}.png")
        rows.append({
            "id": f"{at}", "patient": f"p{at}", "task": "choice", "options": ["dark", "light"],
            "prompt": "Dark or light?", "answer": ("light", "dark")[dark], "images": [f"{at}.png"],
            "split": "train" if at < 12 else ("val", "val", "test", "test")[at - 12],
        })  # fmt: skip
    path = folder / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
