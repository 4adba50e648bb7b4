"""Joint GRPO whose reward is scored in worker processes."""

import textwrap

import pytest

from frugalpath.rewards import workers
from frugalpath.rewards.registry import get_reward

SOURCE = """
    import os

    def even_tokens(completions, completion_ids, answer, budget, **columns):
        kept_out = {"log_metric", "log_extra", "trainer_state", "prompts", "image"} & set(columns)
        if kept_out or len(answer) != len(completions) or len(budget) != len(completions):
            raise ValueError(kept_out)
        return [sum(t % 2 == 0 for t in ids) / max(1, len(ids)) for ids in completion_ids]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(textwrap.dedent(SOURCE))
    yield path
    workers.stop()


@pytest.mark.slow
def test_a_run_with_workers_takes_the_same_steps_and_logs_them(make_performer, make_trainer, path):
    logs = {}
    for n in (0, 2):
        trainer = make_trainer(make_performer(), max_steps=2)
        if n:
            trainer.reward_funcs[2] = get_reward({"name": f"{path}:even_tokens", "workers": n})
        trainer.train()
        trainer.evaluate(trainer.train_dataset.select(range(4)))
        logs[n] = trainer.state.log_history
        judge = trainer.reward_funcs[2]
    assert judge.counts == {"scored": 2 * 8 + 4 * 2, "none": 0, "errors": 0}
    here, there = (next(row for row in log if "loss" in row) for log in (logs[0], logs[2]))
    for key in ("reward", "rewards/even_tokens/mean", "rewards/even_tokens/std", "loss", "grad_norm"):
        assert there[key] == pytest.approx(here[key], rel=1e-6), key
    assert here["rewards/even_tokens/std"] > 0
    training, evaluation = there, next(row for row in logs[2] if "eval_reward" in row)
    for name in ("format", "choice", "even_tokens"):
        for prefix, row in (("", training), ("eval_", evaluation)):
            of = {key: row[f"{prefix}rewards/{name}/{key}"] for key in ("mean", "std", "none", "errors", "seconds")}
            assert of["none"] == of["errors"] == 0
            assert of["std"] >= 0 and 0 <= of["mean"] <= 1
            assert 0 < of["seconds"] < 30
