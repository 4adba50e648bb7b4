"""The main command as a user calls it: to the report, killed and resumed, on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import rl.grpo
import sft.train
from tests.cli.conftest import ENVIRONMENT, ROOT, call, command, write_recipe

POINT = {"accuracy", "ci95", "tokens", "flops", "flops_stage1", "latency_ms", "n"}
MEASURED = ("static", "allocator", "random")


def read_summary(recipe: Path) -> dict:
    return json.loads((recipe.parent / "run" / "report" / "summary.json").read_text())


def results(summary: dict) -> dict:
    """What must be equal between runs: all but times and provenance."""
    kept = {k: v for k, v in summary.items() if k not in ("versions", "git", "command")}
    return json.loads(json.dumps(kept), object_hook=lambda d: {k: v for k, v in d.items() if k != "latency_ms"})


def test_report_is_complete(finished):
    recipe, done = finished
    summary = read_summary(recipe)
    assert summary["n"] == len((recipe.parent / "run" / "report" / "cases.jsonl").read_text().splitlines())
    for name in MEASURED:
        assert all(set(p) >= POINT for p in summary[name])
    assert [p["budget"] for p in summary["static"]] == [1, 4, 16]
    assert set(summary["attribution"]) == {"base", "sft", "sft_continued", "grpo", "grpo_allocator"}
    wanted = {
        "cost_saved",
        "cost_saved_vs_static",
        "accuracy_lost",
        "gain_over_random",
        "gain_over_sft",
        "hypervolume",
    }
    assert set(summary["headline"]) >= wanted
    for name in ("oracle", "text_only", "majority", "operating_point"):
        low, high = summary[name]["ci95"]
        assert low <= summary[name]["accuracy"] <= high
    assert summary["oracle"]["accuracy"] >= max(p["accuracy"] for p in summary["static"])
    assert summary["text_only"]["tokens"] == 0
    assert summary["missing_slides"] == []
    costs = [p["flops"] for p in summary["static"]]
    assert costs == sorted(costs) and costs[0] < costs[-1]
    assert (recipe.parent / "run" / "report" / "pareto.png").stat().st_size > 5000
    assert "gain_over_sft" in done.stdout and "report:" in done.stdout


def test_warm_start_alone(tmp_path, slides):
    recipe = write_recipe(tmp_path, slides)
    done = call("sft/train.py", recipe)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "sft" / "model.safetensors").is_file()
    lines = [line for line in done.stdout.splitlines() if line.strip().endswith("validation cases")]
    assert [int(line.split()[0]) for line in lines] == [1, 4, 16]
    trained = (tmp_path / "run" / "sft" / "done.json").stat().st_mtime_ns
    assert call("sft/train.py", recipe).stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert (tmp_path / "run" / "sft" / "done.json").stat().st_mtime_ns == trained


def test_a_warm_start_without_training_is_refused(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tmp_path, performer={"checkpoint": str(tmp_path)}, sft={})
    monkeypatch.setattr(sys, "argv", command("sft/train.py", recipe)[3:])
    with pytest.raises(SystemExit) as stopped:
        sft.train.main()
    assert stopped.value.code == 2 and "nothing is trained" in capsys.readouterr().err


def test_second_call_trains_nothing(finished):
    recipe, _ = finished
    before = (recipe.parent / "run" / "grpo" / "model.safetensors").stat().st_mtime_ns
    summary = results(read_summary(recipe))
    again = call("rl/pareto.py", recipe)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (recipe.parent / "run" / "grpo" / "model.safetensors").stat().st_mtime_ns == before
    assert results(read_summary(recipe)) == summary


def test_other_settings_are_refused(finished):
    recipe, _ = finished
    done = call("rl/grpo.py", recipe, "--set", "sft.max_steps=7")
    assert done.returncode == 2
    assert "other settings (sft)" in done.stderr and "output_dir" in done.stderr


def test_killed_run_resumes_to_the_same_result(finished, slides, tmp_path):
    recipe = write_recipe(tmp_path, slides)
    folder = tmp_path / "run" / "grpo"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command("rl/grpo.py", recipe), cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.time() + 200
        while not (folder / "checkpoint-4" / "complete").is_file() and time.time() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (folder / "done.json").exists(), "the run ended before it was killed"
    done = call("rl/grpo.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads((folder / "done.json").read_text())["log"]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 9))
    assert results(read_summary(recipe)) == results(read_summary(finished[0]))


def test_two_processes_give_the_same_evaluation(finished, slides, tmp_path):
    """Two processes train, and they evaluate what one process trained to the same figures."""
    recipe = write_recipe(tmp_path, slides, per_device_train_batch_size=4)
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu.yaml"),
        "--main_process_port", "0",
    ]  # fmt: skip
    done = subprocess.run(
        [*launch, *command("rl/grpo.py", recipe)[3:]],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_summary(recipe)
    assert "num_processes 2" in two["command"]
    one = call("rl/pareto.py", recipe)
    assert one.returncode == 0, one.stderr[-2000:]
    assert "gain_over_sft" in one.stdout and "report:" in one.stdout
    assert results(read_summary(recipe)) == results(two)
    tables = tmp_path / "run" / "tables"
    for name in ("grpo.test.jsonl", "grpo.val.jsonl"):
        (tables / name).rename(tables / f"two.{name}")
    assert call("rl/pareto.py", recipe).returncode == 0
    for name in ("grpo.test.jsonl", "grpo.val.jsonl"):
        assert (tables / name).read_text() == (tables / f"two.{name}").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1e-3}, "did you mean 'learning_rate'"),
        ({"rewards": ["choise"]}, "choice"),
        ({"performer": {"layrs": 1}}, "did you mean 'layers'"),
        ({"cases": {"name": "nowhere"}}, "nowhere"),
        ({"cases": {"name": "manifest", "path": "missing.jsonl"}}, "missing.jsonl"),
        ({"ladder": [4, 1]}, "ascending"),
        ({"per_device_train_batch_size": 6}, "multiple of 4"),
    ],
)
def test_bad_recipe_is_one_message_and_status_2(tmp_path, slides, finished, changes, message):
    done = call("rl/grpo.py", write_recipe(tmp_path, slides, **changes))
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def write_images(folder: Path, rows: int = 12) -> list[dict]:
    """Small pictures and the manifest rows that ask about them: 4 patients a split."""
    folder.mkdir(parents=True)
    out = []
    for i in range(rows):
        label = ("benign", "malignant")[i % 2]
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        out.append(
            {"id": f"case{i}", "patient": f"p{i}", "task": "choice", "prompt": "Benign or malignant?", "answer": label}
            | {"options": ["benign", "malignant"], "images": [f"{i}.png"], "split": ("train", "val", "test")[i % 3]}
        )
    return out


def truncated(folder: Path, rows: list[dict]) -> None:
    content = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(content[: len(content) // 2])


def two_splits(folder: Path, rows: list[dict]) -> None:
    rows[4]["patient"] = rows[3]["patient"]


def empty_split(folder: Path, rows: list[dict]) -> None:
    for row in rows:
        row["split"] = "train"


def missing(folder: Path, rows: list[dict]) -> None:
    (folder / "5.png").unlink()
    (folder / "7.png").unlink()


def outside_options(folder: Path, rows: list[dict]) -> None:
    rows[2]["answer"] = "borderline"


def blank_slide(folder: Path, rows: list[dict]) -> None:
    tifffile.imwrite(
        folder / "blank.tif",
        np.full((1024, 1024, 3), 243, np.uint8),
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        resolution=(10000, 10000),
        resolutionunit="CENTIMETER",
    )
    rows[0] |= {"images": [], "slides": ["blank.tif"]}


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (truncated, ["3.png", "truncated"]),
        (two_splits, ["several splits", "train", "manifest.jsonl:4", "val", "manifest.jsonl:5"]),
        (empty_split, ["no case in split val and test"]),
        (missing, ["manifest.jsonl:6", "5.png", "manifest.jsonl:8", "7.png"]),  # all at once
        (outside_options, ["manifest.jsonl:3", "borderline", "options"]),
        (blank_slide, ["blank.tif", "no tissue"]),
    ],
)
def test_bad_data_is_one_message_and_status_2(tmp_path, monkeypatch, capsys, spoil, messages):
    rows = write_images(tmp_path / "data")
    spoil(tmp_path / "data", rows)
    manifest = tmp_path / "data" / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(tmp_path, tmp_path, cases={"name": "manifest", "path": str(manifest)}, encoder={})
    monkeypatch.setattr(sys, "argv", command("rl/grpo.py", recipe)[3:])
    with pytest.raises(SystemExit) as stopped:
        rl.grpo.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    for message in messages:
        assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "sft").exists(), "nothing was trained"
