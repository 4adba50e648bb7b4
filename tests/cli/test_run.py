"""The main command as a user calls it: to the report, killed and resumed, on two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields as columns
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import frugalpath.rl.allocate
import frugalpath.rl.grpo
import frugalpath.rl.pareto
import frugalpath.sft.train
from frugalpath.allocator.score_table import ScoreTable
from tests.cli.conftest import ENVIRONMENT, RECIPE, ROOT, call, command, write_recipe

pytestmark = pytest.mark.slow
POINT = {"accuracy", "ci95", "tokens", "flops", "flops_stage1", "latency_ms", "n"}
MEASURED = ("static", "allocator", "random")


def read_summary(recipe: Path) -> dict:
    return json.loads((recipe.parent / "run" / "report" / "summary.json").read_text())


def results(summary: dict) -> dict:
    """What must be equal between runs: all but times and provenance."""
    kept = {
        k: v for k, v in summary.items() if k not in ("versions", "git", "command", "reproduce", "latency", "seconds")
    }
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


def test_report_tells_how_the_allocator_behaves(finished):
    recipe, done = finished
    summary = read_summary(recipe)
    found = summary["frontier"]
    assert set(found["operating"]) == {"flops", "tokens", "latency_ms"}
    assert found["operating"]["flops"]["cost"] == pytest.approx(summary["operating_point"]["flops"])
    assert found["operating"]["flops"]["stage1"] == summary["operating_point"]["flops_stage1"] > 0
    assert found["operating"]["tokens"]["cost"] == pytest.approx(summary["operating_point"]["tokens"])
    assert found["operating"]["latency_ms"]["cost"] == pytest.approx(summary["operating_point"]["latency_ms"])
    volume = found["hypervolume"]
    assert volume["adaptive"]["value"] == summary["headline"]["hypervolume"]
    for unit in found["operating"].values():
        low, high = unit["cost_share"]["ci95"]
        assert low <= unit["cost_share"]["value"] <= high
    assert summary["headline"]["cost_saved"] == pytest.approx(1 - summary["headline"]["cost_share"]["value"])
    calibrated = summary["calibration"]
    assert list(calibrated["scores"]["by_budget"]) == ["1", "4", "16"]
    assert sum(row["n"] for row in calibrated["spend"]["by_budget"].values()) == summary["n"]
    assert {"question", "image_given_question", "entropy"} < set(summary["information"])
    assert set(summary["latency"]["answer"]) == {"1", "4", "16"}
    assert summary["operating"]["rule"] == "one_error"
    assert summary["operating"]["price"] == summary["headline"]["price"]
    assert [row["step"] for row in summary["training"]] == list(range(1, 9))
    assert {"reward", "entropy", "allocator/chosen_tokens", "rewards/choice/mean"} < set(summary["training"][0])
    commands = [row["command"] for row in summary["reproduce"]]
    assert f"frugalpath answer --config {recipe} --split test --budget 4" in commands
    assert len(commands) == 3 + len(summary["allocator"]) + 1
    for word in (
        "area_over_static",
        "for the decision",
        "rank correlation",
        "predicted scores",
        "mutual information",
        "median ms",
    ):
        assert word in done.stdout
    assert "NaN" not in (recipe.parent / "run" / "report" / "summary.json").read_text()


def test_a_run_is_transferred_to_other_cases(finished, fields, tmp_path, called):
    recipe, _ = finished
    folder = recipe.parent / "run" / "transfer_recipe"
    kept = {f: f.stat().st_mtime_ns for f in (recipe.parent / "run" / "allocator").iterdir()}
    questions = {"question": "diagnosis", "prompt": "What is the diagnosis?"}
    other = write_recipe(tmp_path, tmp_path, cases={**fields, **questions})
    status, told, err = called(frugalpath.rl.pareto.main, "--config", recipe, "--transfer", other)
    assert status == 0, err[-3000:]
    summary, own = json.loads((folder / "summary.json").read_text()), read_summary(recipe)
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    table = (folder / "tables" / "grpo.test.jsonl").read_text().splitlines()[0]
    assert set(json.loads(table)["made_of"]) == {"answers", "scores"}, "mended labels are noticed here too"
    assert summary["n"] == len(rows) == 6 and {row["answer"] for row in rows} <= {"dark", "light"}
    same = {
        "static",
        "allocator",
        "random",
        "oracle",
        "text_only",
        "headline",
        "frontier",
        "calibration",
        "information",
    }
    assert same < set(summary) and "attribution" not in summary
    assert summary["operating"] == own["operating"] and summary["headline"]["price"] == own["headline"]["price"]
    assert summary["headline"]["best_static_budget"] == own["headline"]["best_static_budget"]
    assert summary["transfer"]["recipe"] == str(other)
    assert (folder / "pareto.png").stat().st_size > 5000 and "area_over_static" in told
    assert kept == {f: f.stat().st_mtime_ns for f in kept}, "nothing was fitted"


def test_a_transfer_fits_nothing(finished, fields, tmp_path, called):
    run = shutil.copytree(finished[0].parent / "run", tmp_path / "run", ignore=shutil.ignore_patterns("transfer*"))
    other = write_recipe(tmp_path / "other", tmp_path, cases={**fields, "question": "diagnosis"})
    source = ["--config", finished[0], "--output_dir", run, "--set", "allocator.form=cascade"]
    (run / "allocator" / "decider.json").unlink()
    status, _, err = called(frugalpath.rl.pareto.main, *source, "--transfer", other)
    assert status == 2 and "allocator/decider.json" in err and "frugalpath pareto --config" in err
    assert not list(run.glob("transfer*")) and not list((run / "allocator").glob("esc*"))
    assert called(frugalpath.rl.pareto.main, *source)[0] == 0
    kept = {f: f.stat().st_mtime_ns for f in (run / "allocator").iterdir()}
    status, _, err = called(frugalpath.rl.pareto.main, *source, "--transfer", other)
    assert status == 0, err
    assert kept == {f: f.stat().st_mtime_ns for f in (run / "allocator").iterdir()}
    own, there = (json.loads((run / part / "summary.json").read_text()) for part in ("report", "transfer_recipe"))
    assert there["headline"]["price"] == own["headline"]["price"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"name": "timm:other"}}, "encoder.name is 'timm:other'"),
        ({"cases": {**RECIPE["cases"], "seed": 0}}, "trained or fitted on"),
    ],
)
def test_a_transfer_that_would_mislead_is_refused(finished, slides, tmp_path, called, changes, message):
    recipe, _ = finished
    if "cases" in changes:  # other splits of the same slides
        changes = {"cases": {**changes["cases"], "folder": str(slides), "val_fraction": 0.05, "test_fraction": 0.9}}
    other = write_recipe(tmp_path, slides, **changes)
    status, _, err = called(frugalpath.rl.pareto.main, "--config", recipe, "--transfer", other)
    assert status == 2 and message in err


def test_warm_start_alone(tmp_path, slides, called):
    recipe = write_recipe(tmp_path, slides)
    done = call("sft/train.py", recipe)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "sft" / "model.safetensors").is_file()
    lines = [line for line in done.stdout.splitlines() if line.strip().endswith("validation cases")]
    assert [int(line.split()[0]) for line in lines] == [1, 4, 16]
    trained = (tmp_path / "run" / "sft" / "done.json").stat().st_mtime_ns
    status, again, err = called(frugalpath.sft.train.main, "--config", recipe)
    assert status == 0, err
    assert again.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert (tmp_path / "run" / "sft" / "done.json").stat().st_mtime_ns == trained


def test_a_warm_start_without_training_is_refused(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, tmp_path, performer={"checkpoint": str(tmp_path)}, sft={})
    monkeypatch.setattr(sys, "argv", command("sft/train.py", recipe)[3:])
    with pytest.raises(SystemExit) as stopped:
        frugalpath.sft.train.main()
    assert stopped.value.code == 2 and "nothing is trained" in capsys.readouterr().err


def test_second_call_trains_nothing(finished, called):
    recipe, _ = finished
    before = (recipe.parent / "run" / "grpo" / "model.safetensors").stat().st_mtime_ns
    whole = read_summary(recipe)
    summary = results(whole)
    status, _, err = called(frugalpath.rl.pareto.main, "--config", recipe)
    assert status == 0, err
    assert (recipe.parent / "run" / "grpo" / "model.safetensors").stat().st_mtime_ns == before
    assert results(read_summary(recipe)) == summary
    for key in ("latency", "operating_point", "frontier"):
        assert read_summary(recipe)[key] == whole[key], "what was timed is not timed again"


def test_another_form_reports_on_the_same_training(finished, tmp_path, called):
    recipe, _ = finished
    shutil.copytree(recipe.parent / "run", tmp_path / "run")
    own = shutil.copy(recipe, tmp_path)
    form = ["--output_dir", tmp_path / "run", "--set", "allocator.form=escalate"]
    status, _, err = called(frugalpath.rl.pareto.main, "--config", own, *form)
    assert status == 0, err
    before, after = read_summary(recipe), read_summary(Path(own))
    assert [p["accuracy"] for p in after["static"]] == [p["accuracy"] for p in before["static"]]
    assert len(after["allocator"]) == len(json.loads((tmp_path / "run" / "allocator" / "escalate.json").read_text()))


@pytest.mark.parametrize("script", [frugalpath.rl.pareto, frugalpath.rl.allocate])
def test_a_run_that_was_never_trained_is_not_trained_by_its_report(tmp_path, slides, called, script):
    recipe = write_recipe(tmp_path, slides)
    status, out, err = called(script.main, "--config", recipe)
    assert status == 2 and out == ""
    assert f"no grpo/done.json; run: frugalpath grpo --config {recipe}" in err
    assert not (tmp_path / "run").exists()


def test_other_settings_are_refused(finished, called):
    status, _, err = called(frugalpath.rl.grpo.main, "--config", finished[0], "--set", "sft.max_steps=7")
    assert status == 2
    assert "other settings (sft)" in err and "output_dir" in err


def test_killed_run_resumes_to_the_same_result(finished, slides, tmp_path, called):
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
    status, told, err = called(frugalpath.rl.grpo.main, "--config", recipe)
    assert status == 0, err[-3000:]
    assert f"{folder}: goes on after step " in told
    steps = json.loads((folder / "done.json").read_text())["log"]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 9))
    assert results(read_summary(recipe)) == results(read_summary(finished[0]))


def test_two_processes_give_the_same_evaluation(slides, tmp_path, called):
    """Two processes train, and they evaluate what one process trained to the same figures."""
    recipe = write_recipe(tmp_path, slides, per_device_train_batch_size=4, max_steps=2)
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
    status, one, err = called(frugalpath.rl.pareto.main, "--config", recipe)
    assert status == 0, err
    assert "gain_over_sft" in one and "report:" in one
    assert results(read_summary(recipe)) == results(two)
    tables = tmp_path / "run" / "tables"
    for name in ("grpo.test.jsonl", "grpo.val.jsonl"):
        (tables / name).rename(tables / f"two.{name}")
    assert called(frugalpath.rl.pareto.main, "--config", recipe)[0] == 0
    for name in ("grpo.test.jsonl", "grpo.val.jsonl"):
        again, before = (ScoreTable.load(tables / file) for file in (name, f"two.{name}"))
        # Rows share batches with others, which rounds probabilities otherwise.
        np.testing.assert_allclose(again.confidence, before.confidence, rtol=1e-5)
        for field in columns(ScoreTable):
            if field.name != "confidence":
                np.testing.assert_array_equal(getattr(again, field.name), getattr(before, field.name))


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
def test_bad_recipe_is_one_message_and_status_2(tmp_path, slides, finished, called, changes, message):
    status, _, err = called(frugalpath.rl.grpo.main, "--config", write_recipe(tmp_path, slides, **changes))
    assert status == 2, err
    assert message in err
    assert "Traceback" not in err


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
        frugalpath.rl.grpo.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    for message in messages:
        assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "sft").exists(), "nothing was trained"
