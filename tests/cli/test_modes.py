"""The main command in the modes that are not the default."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import call, write_recipe

QUICK = {"evaluation": {"bootstrap": 20, "sft_continued": False, "linear_probe": False}, "max_steps": 4}


@pytest.mark.parametrize(
    ("mode", "stages"), [("sequential", {"grpo_performer", "grpo"}), ("alternating", {"grpo"})], ids=lambda v: str(v)
)
def test_every_mode_ends_in_the_same_outputs(tmp_path, slides, mode, stages):
    recipe = write_recipe(tmp_path, slides, mode=mode, alternate_every=2, **QUICK)
    done = call("rl/grpo.py", recipe)
    assert done.returncode == 0, done.stderr[-3000:]
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
