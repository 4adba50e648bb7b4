"""A whole run in miniature: 24 tiny simulated slides, a performer of one narrow layer, a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

RECIPE = {
    "cases": {
        "name": "simulator",
        "slides": 24,
        "size_mm": 0.448,
        "mpp": 2.0,
        "questions": ["diagnosis", "quadrant"],
        "val_fraction": 0.25,
        "test_fraction": 0.25,
        "workers": 1,
    },
    "encoder": {"cells": 7, "slide": {"min_tissue": 0.0, "qc": False}},
    "performer": {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 32, "show_options": False},
    "ladder": [1, 4, 16],
    "sft": {
        "max_steps": 40,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "logging_steps": 20,
        "save_steps": 20,
    },
    "evaluation": {"bootstrap": 50, "linear_probe": True},
    "allocator": {"fit_epochs": 2},
    "rewards": ["choice", {"name": "format", "weight": 0.2}],
    "num_generations": 2,
    "budgets_per_image": 2,
    "per_device_train_batch_size": 8,
    "max_completion_length": 8,
    "max_steps": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_steps": 2,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def write_recipe(folder: Path, slides: Path, **changes) -> Path:
    """A recipe file whose run lies in `folder` and whose slides lie in `slides`."""
    content = {**RECIPE, "output_dir": str(folder / "run"), **changes}
    content["cases"] = changes.get("cases") or {**RECIPE["cases"], "folder": str(slides)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def command(script: str, recipe: Path, *extra: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(ROOT / script), "--config", str(recipe), *extra]


def call(script: str, recipe: Path, *extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, recipe, *extra), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=280
    )


@pytest.fixture
def called(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls an entry in this process; gives its status, what it printed and what it told of errors."""

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def slides(tmp_path_factory) -> Path:
    """Folder of the simulated slides, drawn by the first run that needs them."""
    return tmp_path_factory.mktemp("data") / "slides"


@pytest.fixture(scope="session")
def finished(tmp_path_factory, slides) -> tuple[Path, subprocess.CompletedProcess]:
    """Recipe of an undisturbed run and what it printed."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"), slides)
    done = call("rl/grpo.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe, done


@pytest.fixture(scope="session")
def fields(tmp_path_factory) -> dict:
    """`cases` of a recipe over 24 small images, dark ones and light ones, of 12 patients."""
    folder = tmp_path_factory.mktemp("fields")
    rng = np.random.default_rng(0)
    lines = ["file,label,patient"]
    for i in range(24):
        pixels = rng.normal((120, 200)[i % 2], 30, (84, 112, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{('dark', 'light')[i % 2]},p{i // 2}")
    (folder / "cases.csv").write_text("\n".join(lines))
    return {
        "name": "manifest",
        "path": str(folder / "cases.csv"),
        "task": "choice",
        "prompt": "Dark or light?",
        "val_fraction": 0.25,
        "test_fraction": 0.25,
    }
