"""Intervals of means by resampling patients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.bootstrap import Bootstrap


def test_the_interval_of_a_constant_is_a_point():
    bootstrap = Bootstrap([f"p{i // 3}" for i in range(20)], resamples=200)
    assert bootstrap.interval(np.full(20, 0.7)) == pytest.approx((0.7, 0.7), abs=1e-6)
    assert bootstrap.difference(np.zeros(20)) == {"value": 0.0, "ci95": [0.0, 0.0]}


def test_correlated_cases_of_a_patient_widen_the_interval():
    values = np.random.default_rng(0).integers(0, 2, 40).repeat(10).astype(float)
    by_patient = Bootstrap([f"p{i // 10}" for i in range(400)]).interval(values)
    by_case = Bootstrap([f"p{i}" for i in range(400)]).interval(values)
    ratio = (by_patient[1] - by_patient[0]) / (by_case[1] - by_case[0])
    # Ten equal cases a patient: the standard error grows by the root of ten.
    assert 2.6 < ratio < 3.8


def test_independent_cases_give_the_interval_of_theory():
    values = np.random.default_rng(1).integers(0, 2, 500).astype(float)
    low, high = Bootstrap([f"p{i}" for i in range(500)]).interval(values)
    half = 1.96 * values.std() / np.sqrt(500)
    assert low == pytest.approx(values.mean() - half, abs=0.006)
    assert high == pytest.approx(values.mean() + half, abs=0.006)


def test_resamples_are_paired_and_repeatable():
    patients = [f"p{i // 2}" for i in range(30)]
    values = np.random.default_rng(2).random(30)
    assert Bootstrap(patients).interval(values) == Bootstrap(patients).interval(values)
    assert Bootstrap(patients).interval(values) != Bootstrap(patients, seed=1).interval(values)
    # A gain of every case is certain however much the cases differ, which only pairing sees.
    low, high = Bootstrap(patients).interval((values + 0.1) - values)
    assert (low, high) == pytest.approx((0.1, 0.1), abs=1e-6)


def test_cases_without_a_value_do_not_count():
    patients = [f"p{i // 2}" for i in range(40)]
    values = np.random.default_rng(3).random(40)
    values[::4] = np.nan
    low, high = Bootstrap(patients).interval(values)
    assert low < np.nanmean(values) < high
    has = ~np.isnan(values)
    # Every patient keeps one case, so that the draws are the same without the others.
    kept = Bootstrap([p for p, ok in zip(patients, has, strict=True) if ok])
    assert kept.interval(values[has]) == pytest.approx((low, high), abs=1e-6)


def test_a_resample_without_values_is_left_out():
    bootstrap = Bootstrap(["a", "b", "c"], resamples=200)
    means = bootstrap.means(np.array([0.5, np.nan, np.nan]))
    assert np.isnan(means).any() and bootstrap.interval(np.array([0.5, np.nan, np.nan])) == (0.5, 0.5)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=2, max_size=12))
def test_a_ratio_weighs_cells_and_not_cases(counts):
    right, cells = (np.array(column, dtype=float) for column in zip(*counts, strict=True))
    right = np.minimum(right, cells)
    found = Bootstrap([str(i) for i in range(len(cells))], resamples=50).ratio(right, cells)
    assert found["value"] == pytest.approx(right.sum() / cells.sum())
    rates = right / cells
    assert rates.min() - 1e-6 <= found["ci95"][0] <= found["ci95"][1] <= rates.max() + 1e-6


def test_a_ratio_leaves_out_resamples_without_cells():
    found = Bootstrap(["a", "b"], resamples=200).ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert found == {"value": 0.5, "ci95": [0.5, 0.5]}


def test_no_case_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="no cases"):
        Bootstrap([])
