"""Escalation in the miniature world: what it decides from a table is what it does on the cases themselves."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.cascade import CascadeAllocator, fit_cascade, load_cascade
from frugalpath.errors import InputError
from tests.allocator.planted import BUDGETS, PRICES, planted


@pytest.fixture(scope="module")
def trained(make_performer, cases, tmp_path_factory) -> TrainedRun:
    return planted(make_performer, cases, tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(params=["all kinds alike", "by kind"])
def decider(request, trained, tmp_path, monkeypatch) -> CascadeAllocator:
    if request.param == "by kind":
        monkeypatch.setattr("frugalpath.allocator.cascade_plan.ENOUGH", 1)
    monkeypatch.setattr(trained.data.run, "folder", tmp_path)
    return fit_cascade(trained)


@pytest.mark.slow
def test_what_is_decided_from_the_table_is_what_happens(decider):
    cases = decider.data.splits["test"]
    looked = set()
    for price in PRICES:
        decided = decider.decide("test", price)
        rungs, look = decider.choose(cases, price)
        np.testing.assert_array_equal(rungs, decided.rungs)
        table = decider.trained.tables["test"]
        other = decider.decide_on(cases, price, table)
        np.testing.assert_array_equal(other.rungs, decided.rungs)
        np.testing.assert_allclose(other.cost, decided.cost)
        np.testing.assert_allclose(look, decided.look, rtol=1e-9, atol=1e-3)
        told = [decider.answer(case, price) for case in cases]
        assert [a.budget for a in told] == [BUDGETS[r] for r in rungs]
        assert all(a.budget in a.looks for a in told)
        np.testing.assert_allclose([a.look_flops for a in told], look, rtol=1e-9, atol=1e-3)
        np.testing.assert_allclose([a.flops for a in told], decided.flops, rtol=1e-9)
        np.testing.assert_array_equal([len(a.looks) > 1 for a in told], decided.look_tokens > 0)
        assert (look >= -1e-3).all()
        looked |= {(int(r), bool(f > 1)) for r, f in zip(rungs, look, strict=True)}
    assert len({r for r, _ in looked}) > 1, "prices matter"


@pytest.mark.slow
def test_deciding_costs_what_the_looks_before_the_last_took(decider):
    """Of every case that went from rung 0 straight to the last, by hand."""
    table = decider.trained.tables["test"]
    for price in PRICES:
        decided = decider.decide("test", price)
        plans = [decider.plan(price, decider.known.about(kind)) for kind in table.questions]
        start = np.array([plan.start for plan in plans])
        cases = decider.data.splits["test"]
        stayed = np.array([len(decider.answer(case, price).looks) == 1 for case in cases])
        assert (decided.rungs[stayed] == start[stayed]).all()
        asked = np.where(start == 2, 0, decider.known.forecast.flops)
        np.testing.assert_allclose(decided.look[stayed], asked[stayed], rtol=1e-6)
        first = np.take_along_axis(table.flops, start[:, None], 1)[:, 0]
        # Less than both answers in full, as both read the same text and visual tokens.
        assert (decided.look[~stayed] < first[~stayed] + 2 * decider.known.forecast.flops).all()
        np.testing.assert_allclose(decided.cost, decided.flops + decided.look)


@pytest.mark.slow
def test_plans_are_written(decider):
    rows = json.loads((decider.data.run.folder / "allocator" / "escalate.json").read_text())
    kinds = [None, *decider.known.kinds]
    assert [(r["price"], r["question"]) for r in rows] == [(p, k) for p in PRICES for k in kinds]
    starts = [decider.plan(r["price"], decider.known.about(r["question"])).start for r in rows]
    assert [r["start"] for r in rows] == [BUDGETS[start] for start in starts]
    assert rows[-1]["start"] == 1, "at a high price the smallest"


@pytest.mark.slow
def test_validation_cases_are_decided_by_fits_that_had_not_seen_them(decider):
    before = decider.decide("val", 0.1).rungs
    decider.known.forecast.weights[-1] = np.nan
    np.testing.assert_array_equal(decider.decide("val", 0.1).rungs, before)
    assert decider.predicted("val") is None


@pytest.mark.slow
def test_what_was_learnt_is_read_again_and_decides_alike(decider):
    again = load_cascade(decider.trained)
    cases = decider.data.splits["test"]
    for price in (*PRICES, 0.07):
        for kind in ("diagnosis", "never asked"):
            plan = decider.plan(price, decider.known.about(kind))
            assert again.plan(price, again.known.about(kind)) == plan
        np.testing.assert_array_equal(again.choose(cases, price)[0], decider.choose(cases, price)[0])
    written = set(again.known.seen.text.ravel().tolist()) - {a.split(": ", 1)[1] for a in again.known.forecast.answers}
    assert all(t.startswith("~") for t in written), "rare answers may be of one patient alone"


@pytest.mark.slow
def test_time_of_deciding_is_not_negative(decider):
    times = decider.look_ms(decider.data.splits["test"], 0.1)
    assert len(times) == 4 and (times >= 0).all()


def test_a_cascade_of_other_validation_scores_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained.data.run, "folder", tmp_path)
    monkeypatch.setattr(trained.data.run, "path", None, raising=False)
    fit_cascade(trained)
    load_cascade(trained)
    load_cascade(replace(trained, tables={}))  # answering new cases takes no table
    val = trained.tables["val"]
    with pytest.raises(InputError, match=r"other scores of the validation cases .*frugalpath pareto"):
        load_cascade(replace(trained, tables={"val": replace(val, score=1 - val.score)}))
