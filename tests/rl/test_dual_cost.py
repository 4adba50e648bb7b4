"""The dual price lives in TRL's log: it moves with training and goes on after a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import GRPOTrainer

from frugalpath.rewards.registry import get_reward
from tests.rl.qwen import Forced, make_rows, make_trainer


class Stock(Forced, GRPOTrainer):
    """TRL's trainer on completions that give no answer, each of which costs everything."""


def run(folder: Path, resume: str | None = None, **changes: Any) -> list[float]:
    reward = get_reward({"name": "dual_cost", "params": {"target": 0.75, "step": 0.4, "price": 0.2}})
    rows = make_rows("text").add_column("tokens", [16] * 4).add_column("max_budget", [64] * 4)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "reward": reward, **changes}
    trainer = make_trainer(Stock, str(folder), text_only=True, dataset=rows, **options)
    trainer.train(resume_from_checkpoint=resume)
    log = [entry for entry in trainer.state.log_history if "dual_cost/cost" in entry]
    assert all(entry["dual_cost/cost"] == 1.0 for entry in log)
    assert [entry["rewards/dual_cost/mean"] for entry in log] == pytest.approx([-e["dual_cost/price"] for e in log])
    return [entry["dual_cost/price"] for entry in log]


@pytest.mark.slow
def test_the_price_moves_with_the_log_and_goes_on_after_a_checkpoint(tmp_path):
    prices = run(tmp_path / "whole")
    assert prices == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2")) == pytest.approx(prices)


def test_the_price_moves_once_a_logging_step(tmp_path):
    assert run(tmp_path, logging_steps=2) == pytest.approx([0.2, 0.3])
