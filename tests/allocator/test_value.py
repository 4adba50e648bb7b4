"""A value allocator in the miniature world: what it decides, what looking costs, and what was fitted read again."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest

from frugalpath.allocator.value import ValueAllocator, fit_value, load_value
from frugalpath.errors import InputError
from tests.allocator.planted import PRICES, planted


@pytest.fixture(scope="module")
def shared(make_performer, cases, tmp_path_factory):
    return planted(make_performer, cases, tmp_path_factory.mktemp("run"))


@pytest.fixture
def world(shared, tmp_path, monkeypatch):
    trained, network = shared
    monkeypatch.setattr(trained.data.run, "folder", tmp_path)
    return trained, copy.deepcopy(network)


def fit(world) -> ValueAllocator:
    return fit_value(*world)


def test_what_is_decided_from_the_table_is_decided_for_the_cases(world):
    decider = fit(world)
    for price in PRICES:
        decided = decider.decide("test", price)
        rungs, look = decider.choose(decider.data.splits["test"], price)
        np.testing.assert_array_equal(rungs, decided.rungs)
        np.testing.assert_allclose(look, decided.look)
    assert (decider.decide("test", 3.0).rungs == 0).all(), "at a high price the smallest"
    assert decider.objective == world[0].objective


def test_a_fit_is_read_again(world):
    first, again = fit(world), fit(world)
    np.testing.assert_array_equal(first.predicted("val"), again.predicted("val"))
    np.testing.assert_allclose(first.predicted("test"), again.predicted("test"), atol=1e-6)


def test_a_look_costs_its_network(world):
    decider = fit(world)
    decided = decider.decide("test", 0.1)
    np.testing.assert_array_equal(decided.look, [decider.network.flops(n) for n in (1, 1, 1, 2)])


def test_a_fit_follows_the_scores_of_the_validation_cases(world, monkeypatch):
    """Labels of validation cases that were mended left the network, and what it predicts, as they were."""
    trained = replace(world[0], key={"seed": 0})
    monkeypatch.setattr(trained.data.run, "path", None, raising=False)
    first = fit_value(trained, copy.deepcopy(world[1]))
    written = (trained.data.run.folder / "allocator" / "model.safetensors").stat().st_mtime_ns
    assert np.array_equal(load_value(trained).predicted("val"), first.predicted("val"))
    val = trained.tables["val"]
    mended = replace(trained, tables={**trained.tables, "val": replace(val, score=1 - val.score)})
    with pytest.raises(InputError, match=r"other scores of the validation cases .*frugalpath pareto"):
        load_value(mended)
    again = fit_value(mended, copy.deepcopy(world[1]))
    assert (trained.data.run.folder / "allocator" / "model.safetensors").stat().st_mtime_ns != written
    assert not np.allclose(again.predicted("val"), first.predicted("val"))
    assert np.array_equal(load_value(mended).predicted("val"), again.predicted("val"))
