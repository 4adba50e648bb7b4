from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest

from frugalpath.allocator.collapse import CollapseGuard, collapsed, image_information

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
        ({"allocator/largest_share": 1.0, "allocator/smallest_budget": 1.0}, "lower allocator.price"),
        ({"allocator/largest_share": 1.0, "allocator/largest_budget": 1.0}, "raise allocator.price"),
        ({"allocator/largest_share": 1.0, "allocator/below_cap": 1.0}, "set it to linear, log or dual"),
        ({"allocator/image_information": 0.001}, "give it a better look"),
        ({"frac_reward_zero_std": 1.0}, "raise temperature or num_generations"),
    ],
)
def test_each_collapse_is_told_once_with_its_remedy(bad, remedy, caplog):
    with caplog.at_level(logging.WARNING):
        warnings = watch([HEALTHY] * 5 + [{**HEALTHY, **bad}] * 12)
    (warning,) = warnings
    assert remedy in warning and warning.startswith("step ")
    assert [r.getMessage() for r in caplog.records if r.name == "frugalpath.allocator.collapse"] == warnings


def test_a_single_bad_log_is_forgiven():
    bad = {**HEALTHY, "entropy": 0.0, "allocator/largest_share": 1.0, "frac_reward_zero_std": 1.0}
    assert watch([HEALTHY, bad, bad] * 6) == []
    assert len(watch([HEALTHY, bad, bad], patience=2)) == 3


def test_a_run_that_never_was_good_has_not_fallen():
    assert watch([{**HEALTHY, "reward": 0.05}] * 20) == []


def test_what_was_told_is_not_told_again_after_it_got_better():
    bad = {**HEALTHY, "frac_reward_zero_std": 1.0}
    assert len(watch(([HEALTHY] * 3 + [bad] * 5) * 3)) == 1


# A fitted allocator.


def test_image_information_by_hand():
    questions = ["a"] * 8 + ["b"] * 8 + ["alone"]
    # Half of each question's cases get another budget: a bit. What stands alone says nothing.
    assert image_information([0, 1] * 8 + [2], questions) == pytest.approx(1.0)
    assert image_information([0] * 8 + [1] * 8 + [2], questions) == 0.0
    assert image_information([0] * 8 + [0, 1] * 4 + [2], questions) == pytest.approx(0.5)
    assert image_information([0, 1, 0, 1], ["a", "a", "b", "b"]) is None, "too few"
    assert image_information(list(range(20)), list(range(20))) is None


def test_a_fitted_allocator_that_decides_is_left_alone(caplog):
    rng = np.random.default_rng(0)
    questions = ["a", "b"] * 50
    # At the ends of the range of prices all get the same, as they should.
    rungs = {0.0: np.full(100, 2), 0.1: rng.integers(3, size=100), 1.0: np.zeros(100, dtype=int)}
    assert collapsed(rungs, questions, (1, 16, 256)) == []
    unique = [f"q{i}" for i in range(100)]
    assert collapsed({0.1: rungs[0.1]}, unique, (1, 16, 256)) == [], "the image is not told from the question"
    static = {0.0: np.full(100, 2), 0.1: np.full(100, 1), 1.0: np.zeros(100, dtype=int)}
    assert collapsed(static, unique, (1, 16, 256)) == []


@pytest.mark.parametrize(
    ("rung", "below_cap", "remedy"),
    [
        (0, None, "smallest budget; lower allocator.price"),
        (2, None, "largest budget; raise allocator.price"),
        (1, 1, "just below the cap.*set it to linear, log or dual"),
        (1, None, "one budget; change allocator.price"),
    ],
)
def test_the_same_budget_at_every_price_is_told(rung, below_cap, remedy):
    rungs = {price: np.full(100, rung) for price in (0.0, 0.1, 1.0)}
    rungs[0.1][0] = 0
    (warning,) = collapsed(rungs, ["a", "b"] * 50, (1, 16, 256), below_cap)
    assert re.search(remedy, warning) and f"at every price {'100%' if rung == 0 else '99%'}" in warning


def test_budgets_that_follow_from_the_question_alone_are_told():
    by_question = np.array([0, 2] * 50)
    rungs = {0.0: np.full(100, 2), 0.1: by_question, 0.3: by_question, 1.0: np.zeros(100, dtype=int)}
    (warning,) = collapsed(rungs, ["a", "b"] * 50, (1, 16, 256))
    assert "question alone" in warning and "allocator.look" in warning
    rungs[0.3] = np.array([0, 1, 2, 1] * 25)
    assert collapsed(rungs, ["a", "b"] * 50, (1, 16, 256)) == []
