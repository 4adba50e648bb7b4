from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.rewards.cost import OBJECTIVES, parse_budget, worth

TOKENS = np.array([1, 16, 256])
COST = np.array([0.1, 0.25, 1.0])
SCORE = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("linear", [[-0.02, 0.95, 0.8], [0.98, 0.95, 0.8], [-0.02, -0.05, -0.2]]),
        ("dual", [[-0.02, 0.95, 0.8], [0.98, 0.95, 0.8], [-0.02, -0.05, -0.2]]),
        ("birr", [[0, 1, 0.5], [1, 1, 0.5], [0, 0, 0]]),
        # A cheap look is right in half of the right answers, and in two thirds: the expensive ones pay.
        ("visionthink", [[0, 1, 0.9], [1, 1, 0.9], [0, 0, 0]]),
    ],
)
@pytest.mark.parametrize("library", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_presets(objective, expected, library):
    found = worth(objective, library(SCORE), library(TOKENS), library(COST), 0.2)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-12)


def test_each_case_may_have_its_price_and_cost():
    price, cost = np.array([[0.0], [0.1], [0.5]]), np.stack([COST, COST / 2, COST])
    tokens = np.broadcast_to(TOKENS, (3, 3))
    whole = worth("linear", SCORE, tokens, cost, price)
    for row in range(3):
        np.testing.assert_allclose(whole[row], worth("linear", SCORE[row], TOKENS, cost[row], price[row, 0]))


def test_published_vectors_of_the_token_reward():
    rows = [(2142, "128", 1.0, 1.0), (2142, "255", 0.8, 0.8), (2142, "256", 1.0, 0.5), (2142, "4000", 1.0, 0.5)]
    rows += [(100, "99", 1.0, 1.0), (100, "100", 1.0, 0.5), (2142, "12 or 300", 1.0, 1.0)]
    native, text, score, expected = zip(*rows, strict=True)
    tokens = np.array([[parse_budget(t)] for t in text])
    found = worth("birr", np.array(score)[:, None], tokens, tokens, 0.1, cap=np.array(native)[:, None])
    np.testing.assert_allclose(found[:, 0], expected)
    # What asks for no budget is not scored.
    assert [parse_budget(t) for t in ("1", "many")] == [None, None]
    assert worth("birr", np.array([[math.nan]]), [[math.nan]], [[math.nan]], 0.1, cap=2142).tolist() == [[0.0]]


@pytest.mark.parametrize("objective", OBJECTIVES)
@given(
    st.lists(st.lists(st.sampled_from([math.nan, 0.0, 0.3, 1.0]), min_size=3, max_size=3), min_size=2, max_size=4),
    st.floats(0, 2),
)
def test_what_cannot_be_scored_is_never_better(objective, score, price):
    score = np.array(score)
    found = worth(objective, score, TOKENS, COST, price)
    assert np.isfinite(found).all()
    lost = np.isnan(score)
    if lost.any() and not lost.all():
        assert found[lost].max() <= found[~lost].min() + 1e-9


def test_an_unknown_objective_is_named():
    with pytest.raises(InputError, match="objective: 'cheap' is unknown; use one of linear, birr, visionthink, dual"):
        worth("cheap", SCORE, TOKENS, COST, 0.1)
