"""Which split is chosen, of predicted scores that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.allocation.choice import EXHAUSTIVE, Room, SplitCost, greedy

LEVELS = (0, 1, 4, 16)


def room(slides: int, most: int = 48) -> Room:
    """Slides of four levels and equal splits of three budgets."""
    return Room((LEVELS,) * slides, most, tuple((b,) * slides for b in (1, 4, 16)))


def linear(splits) -> np.ndarray:
    return np.array([sum(s) for s in splits]) / 48


def concave(heights, speeds):
    """Sums of saturating functions of the slides' budgets."""
    return lambda splits: np.array(
        [sum(h * (1 - math.exp(-b / v)) for h, v, b in zip(heights, speeds, s, strict=True)) for s in splits]
    )


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.5, 20)), min_size=1, max_size=3),
    st.floats(0.001, 3),
)
@settings(max_examples=60, deadline=None)
def test_greedy_finds_the_best_of_concave_scores(slides, price):
    value = concave(*zip(*slides, strict=True))
    case = room(len(slides), most=1000)
    splits = case.all()
    best = (value(splits) - price * linear(splits)).max()
    split, judged = greedy(case, value, linear, price)
    assert value([split])[0] - price * linear([split])[0] == pytest.approx(best, abs=1e-9)
    assert split in splits and judged >= len(case.equal)


@given(st.integers(0, 10**6), st.floats(0, 2), st.integers(2, 3), st.integers(4, 48))
@settings(max_examples=60, deadline=None)
def test_greedy_is_never_worse_than_equal_shares(seed, price, slides, most):
    case = room(slides, most)
    table = {s: v for s, v in zip([(0,) * slides, *case.all()], np.random.default_rng(seed).random(99), strict=False)}

    def value(splits):
        return np.array([table[s] for s in splits])

    split, _ = greedy(case, value, linear, price)
    worth = value([split, *case.equal]) - price * linear([split, *case.equal])
    assert worth[0] == worth.max() and any(split)
    assert split in case.equal or sum(split) <= most


def test_the_slide_that_matters_gets_the_tokens():
    value = concave((0.0, 1.0, 0.0), (4.0, 4.0, 4.0))
    assert greedy(room(3), value, linear, 0.3)[0] == (0, 16, 0)
    assert greedy(room(3), value, linear, 8.0)[0] == (0, 1, 0)


def test_all_splits_show_something_and_keep_to_the_largest_budget():
    case = Room((LEVELS, LEVELS, (0, 1, 2)), 20, ((1, 1, 1), (4, 4, 2), (7, 7, 2)))
    splits = case.all()
    assert len(set(splits)) == len(splits) and set(case.equal) <= set(splits)
    assert all(0 < sum(s) <= 20 for s in splits)
    expected = {(a, b, c) for a in LEVELS for b in LEVELS for c in (0, 1, 2) if 0 < a + b + c <= 20}
    assert set(splits) == expected | set(case.equal)


def test_draws_are_different_splits_cheap_and_dear_however_many_slides_there_are():
    case = room(12, most=48)
    case = Room(case.levels, 48, ((1,) * 12, (2,) * 12, (4,) * 12))
    assert case.count > EXHAUSTIVE
    drawn = case.draw(60, np.random.default_rng(0))
    assert len(set(drawn)) == len(drawn) == 63 and drawn[:3] == list(case.equal)
    totals = [sum(s) for s in drawn[3:]]
    assert min(totals) > 0 and max(totals) <= 48
    assert sum(t <= 12 for t in totals) > 10 and sum(t > 24 for t in totals) > 10
    assert any(0 in s for s in drawn)
    few = Room((LEVELS,), 16, ((1,), (4,), (16,)))
    assert sorted(few.draw(60, np.random.default_rng(0))) == [(1,), (4,), (16,)]


def test_cost_is_learned_from_answers():
    """A slide that is shown costs 50, a token 2 and its square a hundredth; cases differ by what they say."""
    rng = np.random.default_rng(0)
    splits = [room(3).draw(20, rng) for _ in range(5)]

    def flops(s, case):
        return 1000 * case + 50 * np.count_nonzero(s) + 2 * sum(s) + 0.01 * sum(s) ** 2

    cost = SplitCost.fit(splits, [[flops(s, i) for s in own] for i, own in enumerate(splits)], 500.0)
    asked = [(0, 1, 0), (16, 16, 16), (4, 0, 4)]
    assert cost(asked) == pytest.approx([flops(s, 2) / 500 for s in asked])
