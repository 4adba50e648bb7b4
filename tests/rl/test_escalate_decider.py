"""Escalation in the miniature world: what it decides from a table is what it does on the cases themselves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.look import CheapLook
from models.allocators.network import AllocatorConfig
from models.allocators.value import ValueAllocator
from rl.deciders.escalate import EscalateDecider, fit_escalate
from rl.table import score_table
from tests.conftest import WIDTH

BUDGETS = [1, 5, 21]
PRICES = [0.0, 0.02, 0.1, 0.4, 3.0]


@pytest.fixture(params=["equal", "attention"])
def decider(request, make_performer, cases, tmp_path) -> EscalateDecider:
    """Of scores that are planted: the performer is not trained, but its confidence says how well it does."""
    performer = make_performer(compressors=[{"name": "pool", "nested": True}])
    performer.model.eval()
    performer.model.generation_config.eos_token_id = 299  # answers of some length
    pair = Case("pair", "p9", "choice", "Which?", "normal", images=("field0", "field1"), options=("normal", "tumour"))
    splits = {"val": [*cases, pair], "test": [*cases[:3], pair]}
    torch.manual_seed(0)
    config = AllocatorConfig(ladder=BUDGETS, look=(1,), feature_dim=WIDTH, width=16, buckets=64, share=request.param)
    allocator = ValueAllocator(config)

    def scorer(texts, members, budgets, visual):
        return np.array([(len(m.prompt) + b) % 3 / 2 for m, b in zip(members, budgets, strict=True)])

    tables: dict[str, ScoreTable] = {}

    def table(name, trained, split):
        if split not in tables:
            weights = CheapLook(trained, config).divide(allocator, splits[split])
            tables[split] = score_table(trained, splits[split], BUDGETS, scorer, 5, weights=weights)
        return tables[split]

    stages = SimpleNamespace(
        run=SimpleNamespace(
            ladder=BUDGETS, folder=tmp_path, evaluation=SimpleNamespace(prices=PRICES), allocator=SimpleNamespace()
        ),
        splits=splits,
        table=table,
        max_new_tokens=5,
        is_main=True,
    )
    return fit_escalate(stages, performer, allocator, table("grpo", performer, "val"))


def test_what_is_decided_from_the_table_is_what_happens(decider):
    cases = decider.stages.splits["test"]
    looked = set()
    for price in PRICES:
        decided = decider.decide("test", price)
        rungs, look = decider.choose(cases, price)
        np.testing.assert_array_equal(rungs, decided.rungs)
        np.testing.assert_allclose(look, decided.look, rtol=1e-9, atol=1e-3)
        assert (look >= -1e-3).all()
        looked |= {(int(r), bool(f > 1)) for r, f in zip(rungs, look, strict=True)}
    assert len({r for r, _ in looked}) > 1, "prices matter"


def test_deciding_costs_what_the_looks_before_the_last_took(decider):
    """Of every case that went from rung 0 straight to the last, by hand."""
    table = decider._table("test")
    for price in PRICES:
        plan, decided = decider.plan(price), decider.decide("test", price)
        divided = decider.share_look()
        stayed = decided.rungs == plan.start
        asked = 0 if plan.start == 2 else decider.forecast.flops
        np.testing.assert_allclose(decided.look[stayed], divided[stayed] + asked, rtol=1e-6)
        first = table.flops[:, plan.start]
        # Less than both answers in full, as both read the same text and visual tokens.
        assert (decided.look[~stayed] < divided[~stayed] + first[~stayed] + 2 * decider.forecast.flops).all()
        np.testing.assert_allclose(decided.cost, decided.flops + decided.look)


def test_plans_are_written(decider):
    rows = json.loads((decider.stages.run.folder / "allocator" / "escalate.json").read_text())
    assert [r["price"] for r in rows] == PRICES
    assert all(r["start"] == BUDGETS[decider.plan(r["price"]).start] for r in rows)
    assert rows[-1]["start"] == 1, "at a high price the smallest"


def test_validation_cases_are_decided_by_fits_that_had_not_seen_them(decider):
    before = decider.decide("val", 0.1).rungs
    decider.forecast.weights[-1] = np.nan
    np.testing.assert_array_equal(decider.decide("val", 0.1).rungs, before)
    assert decider.predicted("val") is None


def test_time_of_deciding_is_not_negative(decider):
    assert decider.look_ms() >= 0
