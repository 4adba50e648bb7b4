"""A run whose slides have budgets of their own, from simulated slides to the report, and its benchmark."""

from __future__ import annotations

import json

from tests.cli.conftest import RECIPE, call, write_recipe
from tests.cli.test_slide_paths import SHORT, stages
from tests.models.test_slide_paths import PATHS


def test_budgets_per_slide_from_slides_to_report(slides, tmp_path):
    cases = {
        **RECIPE["cases"],
        "folder": str(slides),
        "slides_per_case": 2,
        "questions": ["diagnosis", "case_diagnosis", "which_slide"],
        "test_fraction": 0.4,
    }
    path = write_recipe(
        tmp_path,
        tmp_path,
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
    run = tmp_path / "run"
    config = json.loads((run / "allocator" / "config.json").read_text())
    assert config["slide_ladder"] == [0, 1, 4, 10] and config["max_slides"] == 32
    answered = [json.loads(line) for line in (run / "tables" / "grpo.val.splits.jsonl").read_text().splitlines()]
    assert {tuple(row["budgets"]) for row in answered} > {(1, 1), (4, 4), (10, 10)}
    markers = 1
    for row in answered:
        assert row["visual"] <= sum(row["budgets"]) + markers * sum(b > 0 for b in row["budgets"])
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert len(summary["allocator"]) == 13 and summary["operating_point"]["flops_stage1"] > 0
    asked = {
        (row["id"], tuple(row["budgets"])): row
        for row in map(json.loads, (run / "tables" / "grpo.test.splits.jsonl").read_text().splitlines())
    }
    for row in map(json.loads, (run / "report" / "cases.jsonl").read_text().splitlines()):
        answer = asked[row["id"], tuple(row["budgets"])]
        assert (row["completion"], row["score"], row["tokens"]) == (answer["text"], answer["score"], answer["visual"])
        assert row["budget"] == sum(row["budgets"]) <= 20
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
