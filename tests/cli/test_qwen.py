"""A whole run of a small Qwen2.5-VL, and of a small Gemma 3, which see the images themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import frugalpath.rl.grpo
from tests.cli.conftest import RECIPE, command, write_recipe

pytestmark = pytest.mark.slow
PERFORMER = {**RECIPE["performer"], "family": "qwen_vl"}


def run_of(tmp_path, fields, monkeypatch, family: str, lora, ladder: list[int]) -> dict:
    """The summary of a whole run over images of 112 x 84 px."""
    recipe = write_recipe(
        tmp_path,
        tmp_path,
        cases=fields,
        encoder={"field_side": 112},
        performer={**PERFORMER, "family": family, "lora": lora},
        ladder=ladder,
        sft={**RECIPE["sft"], "max_steps": 20},
        max_steps=4,
        max_completion_length=16,
        gold_rollout=True,  # so that there is something to learn from
        vision_cache=str(tmp_path / "vision"),
    )
    monkeypatch.setattr(sys, "argv", command("rl/grpo.py", recipe)[3:])
    frugalpath.rl.grpo.main()
    return json.loads((tmp_path / "run" / "report" / "summary.json").read_text())


def test_qwen_with_adapters_runs_to_the_report(tmp_path, fields, monkeypatch, capsys):
    summary = run_of(tmp_path, fields, monkeypatch, "qwen_vl", {"r": 4}, [1, 4, 12])
    # 112 x 84 px are 4 x 3 tokens; at a budget of 4 they are shown as 2 x 1 or 2 x 2.
    assert [p["budget"] for p in summary["static"]] == [1, 4, 12]
    assert [p["tokens"] for p in summary["static"]][::2] == [1.0, 12.0]
    assert 1 < summary["static"][1]["tokens"] <= 4
    costs = [p["flops"] for p in summary["static"]]
    assert costs == sorted(costs), "the vision tower is counted"
    assert list((tmp_path / "vision").rglob("*.safetensors")), "the tower's features are kept"
    states = {name: load_file(tmp_path / "run" / name / "model.safetensors") for name in ("sft", "grpo")}
    assert not any("lora" in key for key in states["grpo"])
    moved = {key for key, value in states["sft"].items() if not value.equal(states["grpo"][key])}
    assert moved and not any("visual" in key for key in moved), "the tower is frozen"
    assert "report:" in capsys.readouterr().out


def test_slides_are_not_for_qwen(tmp_path, slides, monkeypatch, capsys):
    recipe = write_recipe(tmp_path, slides, performer=PERFORMER)
    monkeypatch.setattr(sys, "argv", command("rl/grpo.py", recipe)[3:])
    with pytest.raises(SystemExit) as stopped:
        frugalpath.rl.grpo.main()
    assert stopped.value.code == 2 and "qwen_vl reads images" in capsys.readouterr().err


def test_gemma_runs_to_the_report(tmp_path, fields, monkeypatch, capsys):
    summary = run_of(tmp_path, fields, monkeypatch, "gemma_vl", None, [1, 4, 16])
    assert [p["tokens"] for p in summary["static"]] == [1.0, 4.0, 16.0]
    costs = [p["flops"] for p in summary["static"]]
    assert costs == sorted(costs)
    # One grid an image, which all budgets are pooled from.
    shown = len(list(Path(fields["path"]).parent.glob("*.png")))
    assert 0 < len(list((tmp_path / "vision").rglob("*.safetensors"))) <= shown
    states = {name: load_file(tmp_path / "run" / name / "model.safetensors") for name in ("sft", "grpo")}
    moved = {key for key, value in states["sft"].items() if not value.equal(states["grpo"][key])}
    assert moved and all("language_model" in key or "lm_head" in key for key in moved), (
        "tower and projector are frozen"
    )
    assert "report:" in capsys.readouterr().out
