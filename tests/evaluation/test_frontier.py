from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from frugalpath.allocator.score_table import chosen
from frugalpath.bootstrap import Bootstrap
from frugalpath.evaluation.frontier import mixed, oracle_rungs, pick_price, point


def test_a_point_holds_the_means():
    bootstrap = Bootstrap(["a", "b", "c", "d"], resamples=100)
    found = point(
        np.array([1.0, 0, 1, 1]),
        np.array([1, 4, 16, 16]),
        np.array([10.0, 20, 30, 40]),
        bootstrap,
        stage1=5.0,
        price=0.1,
    )
    assert (found.accuracy, found.tokens, found.flops, found.flops_stage1, found.n) == (0.75, 9.25, 30.0, 5.0, 4)
    assert found.ci95[0] <= 0.75 <= found.ci95[1]
    assert found.to_dict()["price"] == 0.1
    assert "budget" not in found.to_dict() and found.to_dict()["latency_ms"] is None


def test_mixed_is_the_mean_over_random_allocations():
    rng = np.random.default_rng(3)
    values, rungs = rng.random((12, 4)), rng.integers(0, 4, 12)
    draws = np.stack([chosen(values, rng.permutation(rungs)) for _ in range(20000)])
    # The standard error of a case's mean is at most 0.5 / sqrt(20000) = 0.0035.
    np.testing.assert_allclose(mixed(values, rungs), draws.mean(0), atol=0.015)
    assert mixed(values, np.full(12, 2)) == pytest.approx(values[:, 2])


tables = st.tuples(st.integers(1, 8), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(float, shape, elements=st.sampled_from([0.0, 0.5, 1.0])),
        arrays(float, shape, elements=st.floats(1, 1000)),
    )
)


@given(tables)
def test_the_oracle_takes_the_cheapest_of_the_best(table):
    score, flops = table
    for row, cost, rung in zip(score, flops, oracle_rungs(score, flops), strict=True):
        assert (row[rung], -cost[rung]) == max(zip(row, -cost, strict=True))
    np.testing.assert_array_equal(chosen(score, oracle_rungs(score, flops)), score.max(1))


@pytest.mark.parametrize(
    ("lost", "errors", "tolerance", "expected"),
    [
        ([0.0, 0.01, 0.1], [0, 0, 0], 0.0, 0),  # only the dearest is as good
        ([0.0, 0.005, 0.1], [0, 0, 0], 0.005, 1),  # the tolerance buys a cheaper one
        ([0.0, 0.02, 0.1], [0, 0.02, 0.02], 0.005, 1),  # so does one standard error
        ([0.0, 0.01, -0.05], [0, 0, 0], 0.0, 2),  # the cheapest is the best as well
        ([0.2, 0.1, 0.15], [0.05, 0.05, 0.05], 0.005, 1),  # none is good enough: the one that loses least
        ([0.2, 0.2, 0.2], [0, 0, 0], 0.005, 0),
    ],
)
def test_the_price_is_the_cheapest_within_the_tolerance(lost, errors, tolerance, expected):
    assert pick_price(lost, errors, [3.0, 2.0, 1.0], tolerance) == expected
