"""A run whose slides have budgets of their own, from simulated slides to the report, and its benchmark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import RECIPE, call, write_recipe
from tests.cli.test_slide_paths import SHORT, stages
from tests.models.test_slide_paths import PATHS


@pytest.fixture(scope="module")
def trained(slides, tmp_path_factory) -> Path:
    """Recipe of a finished run, whose cases have two slides each."""
    folder = tmp_path_factory.mktemp("splits")
    cases = {
        **RECIPE["cases"],
        "folder": str(slides),
        "slides_per_case": 2,
        "questions": ["diagnosis", "case_diagnosis", "which_slide"],
        "test_fraction": 0.4,
    }
    path = write_recipe(
        folder,
        folder,
        cases=cases,
        questions=["case_diagnosis", "which_slide"],
        performer={**RECIPE["performer"], **PATHS["pathosynvlm"]},
        sft=stages("pathosynvlm", "diagnosis"),
        ladder=[2, 8, 20],
        allocator={"look": [2], "fit_epochs": 2, "fit_splits": 4, "share": "split"},
        **SHORT,
    )
    done = call("rl/grpo.py", path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_budgets_per_slide_from_slides_to_report(trained):
    path, run = trained, trained.parent / "run"
    config = json.loads((run / "allocator" / "config.json").read_text())
    assert config["slide_ladder"] == [0, 1, 4, 10] and config["max_slides"] == 32
    answered = rows_of((run / "tables" / "grpo.val.splits.jsonl").read_text())
    assert {tuple(row["budgets"]) for row in answered} > {(1, 1), (4, 4), (10, 10)}
    markers = 1
    for row in answered:
        assert row["visual"] <= sum(row["budgets"]) + markers * sum(b > 0 for b in row["budgets"])
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert len(summary["allocator"]) == 13 and summary["operating_point"]["flops_stage1"] > 0
    asked = {
        (row["id"], tuple(row["budgets"])): row
        for row in rows_of((run / "tables" / "grpo.test.splits.jsonl").read_text())
    }
    for row in rows_of((run / "report" / "cases.jsonl").read_text()):
        answer = asked[row["id"], tuple(row["budgets"])]
        assert (row["completion"], row["score"], row["tokens"]) == (answer["text"], answer["score"], answer["visual"])
        assert row["budget"] == sum(row["budgets"]) <= 20 and row["rung"] in (2, 8, 20)
    times = {p: p.stat().st_mtime_ns for p in (run / "allocator" / "done.json", run / "grpo" / "done.json")}
    found = call("benchmarks/case_budgets.py", path, "--prices", "0.01", "0.3")
    assert found.returncode == 0, found.stderr[-3000:]
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("{")]
    result = json.loads(line)
    assert {p: p.stat().st_mtime_ns for p in times} == times, "nothing is fitted or trained again"
    assert [p["price"] for p in result["points"]] == [0.01, 0.3]
    for point in result["points"]:
        assert set(point["less"]) == {"equal", "value", "attention", "random", "shuffled"}
        assert all(d["ci95"][0] <= d["value"] <= d["ci95"][1] for d in point["less"].values())
    assert result["points"][0]["cost"] >= result["points"][1]["cost"] > 0


def test_a_deployed_run_gives_each_slide_its_budget(trained, tmp_path):
    """What answers, without tables and folds of the fit, the test cases as the report has them, and a new case."""
    run = trained.parent / "run"
    for part in ("grpo", "allocator", "report"):
        shutil.copytree(run / part, tmp_path / part, ignore=shutil.ignore_patterns("checkpoint-*", "folds"))
    done = call("rl/answer.py", trained, "--output_dir", str(tmp_path), "--split", "test", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = rows_of(done.stdout)
    summary = json.loads((run / "report" / "summary.json").read_text())
    point, found = summary["operating_point"], last["totals"]
    assert (found["price"], found["n"], found["score"]) == (point["price"], point["n"], point["accuracy"])
    assert found["flops"] == pytest.approx(point["flops"])
    told = {row["id"]: row for row in rows_of((run / "report" / "cases.jsonl").read_text())}
    for row in rows:
        shared = ("budget", "budgets", "completion", "score", "tokens", "prompt_tokens", "generated_tokens")
        assert [row[k] for k in shared] == [told[row["id"]][k] for k in shared]
    features = sorted((run / "features" / "slides" / "features").glob("*.h5"))[:3]
    question = ["--slide", *map(str, features), "--question", "What is the diagnosis of the case?", "--json"]
    nowhere = ["--output_dir", str(tmp_path), "--set", f"cases.folder={tmp_path / 'nowhere'}"]
    done = call("rl/answer.py", trained, *nowhere, *question, "--price", "0.01")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = rows_of(done.stdout)
    assert len(row["budgets"]) == 3 and sum(row["budgets"]) == row["budget"] <= 20 and row["flops_stage1"] > 0
    done = call("rl/answer.py", trained, *nowhere, *question, "--budget", "8")
    (row,) = rows_of(done.stdout)
    assert (row["budget"], row["flops_stage1"]) == (8, 0) and "budgets" not in row


def test_other_cases_are_answered_at_the_budgets_of_their_slides(trained, slides, tmp_path):
    run = trained.parent / "run"
    cases = {**RECIPE["cases"], "folder": str(tmp_path / "others"), "seed": 7, "slides_per_case": 2}
    cases |= {"questions": ["case_diagnosis", "which_slide"], "test_fraction": 0.4}
    other = write_recipe(tmp_path, tmp_path, cases=cases)
    done = call("rl/pareto.py", trained, "--transfer", str(other))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = run / "transfer_recipe"
    bought = {
        (r["id"], tuple(r["budgets"])): r for r in rows_of((folder / "tables" / "grpo.splits.jsonl").read_text())
    }
    rows = rows_of((folder / "cases.jsonl").read_text())
    assert rows and json.loads((folder / "summary.json").read_text())["n"] == len(rows)
    for row in rows:
        answer = bought[row["id"], tuple(row["budgets"])]
        assert (row["completion"], row["score"], row["tokens"]) == (answer["text"], answer["score"], answer["visual"])
