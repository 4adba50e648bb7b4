"""The files of `configs/accelerate`: each trains the same, and resumes exactly.

Where Accelerate wants accelerators, `worker.py` lets it take CPUs; all else is as a user calls it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.testing import assert_close

from frugalpath.slides.store import write_features
from tests.conftest import grid_features, noise

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
TWO = {"cpu": [], **{name: ["--num_processes", "2"] for name in ("zero2", "zero3", "fsdp2")}}
"""Launches of two processes, and what they say beside the file."""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (extras `dev`, `gpu`)"
)

RECIPE: dict[str, Any] = {
    # Dropout draws other numbers on other processes.
    "performer": {
        "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab_size": 300, "show_options": False,
        "aligner_width": 16, "aligner_dropout": 0.0,
    },
    "ladder": [1, 4, 9],
    "allocator": {"look": [1, 4], "width": 16},
    "rewards": ["choice", "tests.launch.likeness:likeness"],
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_completion_length": 24,
    # The same on any number of processes: all budgets, what is likeliest, and a gold answer to learn from. In the
    # second iteration the loss depends on what was learnt in the first.
    "budgets_per_image": 3,
    "num_generations": 2,
    "num_iterations": 2,
    "gold_rollout": True,
    "generation_kwargs": {"do_sample": False},
    "logging_steps": 1,
    "save_steps": 2,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen": {"family": "qwen_vl", "lora": LORA},
    "gemma": {"family": "gemma_vl", "lora": LORA, "layers": 2},
}
"""Performers with a frozen vision tower, by the folder of their run."""
TOWERS_OF = {"one_gpu": ("qwen", "gemma"), "zero3": ("qwen",), "fsdp2": ("qwen", "gemma")}
"""Which of them run under a launch: weights that are shared out are what could keep a tower from seeing."""
BLIND = {"max_steps": 10, "text_only": 0.25, "ladder": [9]}
"""Supervised batches of which one process has all seen, or shows none, while the other still has some to see."""
SAMPLED = {
    "max_steps": 3, "max_completion_length": 12, "gold_rollout": False, "generation_kwargs": None,
    "budgets_per_image": 2,
}  # fmt: skip


def ask(folder: Path, key: str, files: list[str]) -> Path:
    """A manifest of one question about each of 20 slides or images; every other one is of a tumour."""
    rows = [
        {
            "id": f"case{i}", "patient": f"p{i}", "task": "choice", "options": ["normal", "tumour"],
            "prompt": "Normal or tumour?" + " Look well." * (i % 3), "answer": ("normal", "tumour")[i % 2],
            key: [file], "split": "train" if i < 16 else ("val", "val", "test", "test")[i - 16],
        }
        for i, file in enumerate(files)
    ]  # fmt: skip
    path = folder / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Questions about stored features; those of tumours are shifted."""
    folder = tmp_path_factory.mktemp("cases")
    for i in range(20):
        write_features(folder / f"{i}.h5", grid_features(4, 4, 2.0 * (i % 2), seed=i))
    return ask(folder, "slides", [f"{i}.h5" for i in range(20)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Questions about images; those of tumours are darker."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        noise(112, 84, i).point(lambda value, dark=i % 2: value // (1 + dark)).save(folder / f"{i}.png")
    return ask(folder, "images", [f"{i}.png" for i in range(20)])


def recipe(
    manifest: Path, folder: Path, processes: int, stage: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """A recipe file of a run in `folder`; a step takes the same cases on any number of processes.

    The training cases are a whole number of steps: an epoch's last step has fewer on one process than on two.

    Args:
        stage: further keys of the supervised stage.
    """
    sft = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        **(stage or {}),
    }
    content = {
        "cases": {"name": "manifest", "path": str(manifest)},
        **RECIPE,
        "sft": {**sft, "gradient_accumulation_steps": 2 // processes},
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 2 // processes,
        "output_dir": str(folder),
        **changes,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(options: list[str], recipes: list[Path]) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "tests/launch/worker.py"]
    return subprocess.Popen(
        [*command, *map(str, recipes)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen) -> None:
    try:
        out, _ = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, out[-4000:]


@pytest.fixture(scope="module")
def launched(manifest, pictures, tmp_path_factory) -> Callable[[str], Path]:
    """Folder of what the processes of a launch did: `run`, `sampled`, after its resumption `resumed`, `TOWERS_OF`."""
    done: dict[str, Path] = {}

    def launch(name: str) -> Path:
        if name not in done:
            folder, processes = tmp_path_factory.mktemp(name), 1 if name == "one_gpu" else 2
            options = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0", *TWO.get(name, [])]
            recipes = [recipe(manifest, folder / "run", processes)]
            again = {**SAMPLED, "sft": None, "per_device_train_batch_size": 8}
            again["performer"] = {**RECIPE["performer"], "checkpoint": str(folder / "run" / "sft")}
            recipes += [recipe(manifest, folder / part, processes, **again) for part in ("sampled", "resumed")]
            for part in TOWERS_OF.get(name, ()):
                own = {"performer": {**RECIPE["performer"], **TOWERS[part]}, "encoder": {"field_side": 112}}
                recipes.append(recipe(pictures, folder / part, processes, BLIND, **own))
            finish(start(options, recipes))
            done[name] = folder
        return done[name]

    return launch


def losses(folder: Path) -> list[dict[str, float]]:
    """What the steps of a run logged that all launches share."""
    steps = [row for s in ("sft", "grpo") for row in json.loads((folder / s / "done.json").read_text())["log"]]
    return [{k: r[k] for k in ("loss", "grad_norm", "allocator/loss") if k in r} for r in steps if "loss" in r]


def assert_same_losses(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) >= 6
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-4)


LAUNCHES = [pytest.param(name, marks=needs_deepspeed if name.startswith("zero") else ()) for name in TWO]


@pytest.mark.parametrize("name", LAUNCHES)
def test_losses_are_those_of_one_process(launched, name):
    expected = losses(launched("one_gpu") / "run")
    assert len({round(row["loss"], 3) for row in expected}) >= 5, "there was something to learn"
    assert_same_losses(losses(launched(name) / "run"), expected)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(*launch.values, part, marks=launch.marks)
        for launch in LAUNCHES
        for part in TOWERS_OF.get(str(launch.values[0]), ())
    ],
)
def test_a_frozen_tower_sees_while_weights_are_shared_out(launched, name, part):
    expected = losses(launched("one_gpu") / part)
    assert len(expected) == BLIND["max_steps"] + RECIPE["max_steps"]
    assert_same_losses(losses(launched(name) / part), expected)


@pytest.mark.parametrize("name", ["one_gpu", *LAUNCHES])
def test_a_resumed_run_ends_where_the_whole_run_ends(launched, name):
    """With sampled budgets and completions, so that each process goes on with its own random numbers."""
    whole, resumed = launched(name) / "sampled" / "grpo", launched(name) / "resumed" / "grpo"
    for path in ("model.safetensors", "allocator/model.safetensors"):
        end, again = load_file(whole / path), load_file(resumed / path)
        start = load_file(whole / "checkpoint-2" / path)
        assert any((end[key] - start[key]).abs().max() > 1e-4 for key in end), "something was learnt after the stop"
        for key, value in end.items():
            assert_close(again[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=f"{path} {key}": f"{k}: {m}")


def test_two_machines_train_as_one_process(launched, manifest, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = recipe(manifest, tmp_path / "run", 2)
    shared = ["--config_file", str(CONFIGS / "two_nodes.yaml"), "--num_processes", "2", "--main_process_port"]
    machines = [start([*shared, str(port), "--machine_rank", str(rank)], [path]) for rank in range(2)]
    for machine in machines:
        finish(machine)
    assert_same_losses(losses(tmp_path / "run"), losses(launched("one_gpu") / "run"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_file_and_its_head_says_how_to_call_it(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file configs/accelerate/{path.name}" in line for line in head)
