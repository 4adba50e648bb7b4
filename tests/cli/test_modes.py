"""The main command in the modes that are not the default."""

from __future__ import annotations

import json

import pytest

import frugalpath.rl.allocate
import frugalpath.rl.grpo
from tests.cli.conftest import write_recipe

pytestmark = pytest.mark.slow

QUICK = {"evaluation": {"bootstrap": 20, "sft_continued": False, "linear_probe": False}, "max_steps": 4}


@pytest.mark.parametrize(
    ("mode", "stages"),
    [("sequential", {"grpo_performer", "grpo"}), ("alternating", {"grpo"})],
    ids=["sequential", "alternating"],
)
def test_every_mode_ends_in_the_same_outputs(tmp_path, slides, called, mode, stages):
    recipe = write_recipe(tmp_path, slides, mode=mode, alternate_every=2, **QUICK)
    status, _, err = called(frugalpath.rl.grpo.main, "--config", recipe)
    assert status == 0, err[-3000:]
    run = tmp_path / "run"
    assert (run / "grpo" / "model.safetensors").is_file() and (run / "tables" / "grpo.test.jsonl").is_file()
    assert (run / "grpo" / "allocator" / "model.safetensors").is_file()
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["seconds"]) == {"sft", "allocator"} | stages
    assert all(seconds > 0 for seconds in summary["seconds"].values())
    record = json.loads((run / "grpo" / "done.json").read_text())
    learnt = [row["step"] for row in record["log"] if "allocator/loss" in row]
    assert learnt == ([3, 4] if mode == "alternating" else [1, 2, 3, 4])
    if mode == "sequential":
        alone = json.loads((run / "grpo_performer" / "done.json").read_text())
        assert not any("allocator/loss" in row for row in alone["log"]) and alone["steps"] == record["steps"] == 4
        assert record["flops"] > alone["flops"], "the answers that the allocator learnt from are counted too"
        weights = [(run / name / "model.safetensors").read_bytes() for name in ("grpo_performer", "grpo")]
        assert weights[0] == weights[1]


def test_a_budget_is_written_after_the_performer_learnt(tmp_path, slides, called):
    """The published recipe: SFT, GRPO of the performer, then of an adapter that writes budgets."""
    taught = {"max_steps": 10, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    text = {"warm_start": taught, "look": 4, "grpo": {"max_steps": 2, "num_generations": 4}}
    recipe = write_recipe(tmp_path, slides, mode="sequential", allocator={"form": "text", "text": text}, **QUICK)
    status, _, err = called(frugalpath.rl.grpo.main, "--config", recipe)
    assert status == 0, err[-3000:]
    run = tmp_path / "run"
    adapter = run / "text" / "adapter_model.safetensors"
    trained = adapter.stat().st_mtime_ns
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["seconds"]) == {"sft", "grpo_performer", "grpo", "text_warm_start", "text"}
    (own,) = summary["allocator"]
    assert own == summary["operating_point"]
    assert own["flops_stage1"] > summary["static"][0]["flops"], "the whole pass of the allocator is paid for"
    cases = [json.loads(line) for line in (run / "report" / "cases.jsonl").read_text().splitlines()]
    assert all(2 <= case["budget"] <= 49 and "asked" in case for case in cases)
    record = json.loads((run / "grpo" / "done.json").read_text())
    assert record["steps"] == 0 and not record["log"], "no network learns in its place"
    status, told, err = called(frugalpath.rl.allocate.main, "--config", recipe)
    assert status == 0 and f"written to {run / 'text'}" in told, err[-2000:]
    assert adapter.stat().st_mtime_ns == trained
