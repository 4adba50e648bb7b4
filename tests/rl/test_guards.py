from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from rl.guards import CollapseGuard

HEALTHY = {"reward": 0.6, "entropy": 0.4, "allocator/largest_share": 0.5, "frac_reward_zero_std": 0.3}


def watch(logs: list[dict], **options) -> list[str]:
    """Warnings of a run that logs these rows."""
    guard = CollapseGuard(**options)
    for step, row in enumerate(logs):
        guard.on_log(None, SimpleNamespace(global_step=step), None, logs=row)
    return guard.warnings


def test_a_healthy_run_is_left_alone():
    rising = [{**HEALTHY, "reward": 0.2 + 0.02 * i + 0.1 * (-1) ** i, "entropy": 0.5 / (i + 1)} for i in range(30)]
    assert watch(rising) == []
    assert watch([{"train_runtime": 3.0}, {"eval_loss": 1.0}, {"reward": 0.5}]) == []


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        ({"reward": 0.1}, "lower learning_rate, set beta"),
        ({"entropy": 1e-5}, "raise temperature, lower learning_rate"),
        ({"allocator/largest_share": 1.0}, "change allocator.price"),
        ({"frac_reward_zero_std": 1.0}, "raise temperature or num_generations"),
    ],
)
def test_each_collapse_is_told_once_with_its_remedy(bad, remedy, caplog):
    with caplog.at_level(logging.WARNING):
        warnings = watch([HEALTHY] * 5 + [{**HEALTHY, **bad}] * 12)
    (warning,) = warnings
    assert remedy in warning and warning.startswith("step ")
    assert [r.getMessage() for r in caplog.records if r.name == "rl.guards"] == warnings


def test_a_single_bad_log_is_forgiven():
    bad = {**HEALTHY, "entropy": 0.0, "allocator/largest_share": 1.0, "frac_reward_zero_std": 1.0}
    assert watch([HEALTHY, bad, bad] * 6) == []
    assert len(watch([HEALTHY, bad, bad], patience=2)) == 3


def test_a_run_that_never_was_good_has_not_fallen():
    assert watch([{**HEALTHY, "reward": 0.05}] * 20) == []
