"""Answers in two stages, one case at a time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.value import ValueAllocator, ValueNetwork
from frugalpath.deploy.run import answer_all, closing, head, line, totals
from frugalpath.rewards.registry import get_rewards
from frugalpath.rewards.scoring import Scorer
from tests.conftest import LADDER, WIDTH

COST = [0.1, 0.3, 1.0]


@pytest.fixture
def make_allocator(performer):
    """A value allocator of no fit, whose predicted scores rise with the budget, in a run that has nothing else."""

    def make() -> ValueAllocator:
        torch.manual_seed(0)
        config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64)
        allocator = ValueNetwork(config)
        with torch.no_grad():
            allocator.head[-1].weight.zero_()
            allocator.head[-1].bias.copy_(torch.tensor([0.4, 0.6, 0.8]).logit())
        data = SimpleNamespace(run=SimpleNamespace(ladder=list(LADDER)), max_new_tokens=4)
        trained = TrainedRun(data, performer, Objective("linear", LADDER, tuple(COST)))
        return ValueAllocator(trained, allocator, np.zeros((0, 3)))

    return make


def test_the_price_chooses_and_both_stages_are_counted(make_allocator, cases):
    decider = make_allocator()
    # Predicted score minus price times cost: .8 - 1 p, .6 - .3 p, .4 - .1 p.
    for price, budget in ((0.0, 16), (0.2, 16), (0.5, 4), (1.1, 1)):
        answered = decider.answer(cases[0], price)
        assert (answered.budget, answered.looks) == (budget, (budget,)) and answered.visual == budget
        (alone,) = decider.performer.answer(cases[:1], [budget], 4, 1)
        assert (answered.text, answered.flops, answered.prompt) == (alone.text, alone.flops, alone.prompt)
        assert answered.confidence == pytest.approx(alone.confidence)
        assert answered.look_flops == decider.network.flops(1) and answered.look_ms > 0 and answered.ms > 0


def test_a_fixed_budget_takes_no_look(make_allocator, cases):
    answered = make_allocator().answer_at(cases[0], 9)
    assert answered.looks == (9,) and answered.visual == 9 and answered.look_flops == 0


def test_only_cases_with_a_gold_answer_are_scored(make_allocator, cases):
    asked = [cases[0], dataclasses.replace(cases[1], answer="")]
    scorer = Scorer(get_rewards(["choice"]), 16)
    rows = list(answer_all(make_allocator(), asked, budget=4, scorer=scorer))
    assert [row["id"] for row in rows] == ["case0", "case1"]
    assert "score" in rows[0] and "score" not in rows[1]
    found = totals(rows)
    assert (found["n"], found["scored"], found["tokens"], found["budgets"]) == (2, 1, 4.0, {"4": 2})
    assert found["score"] == rows[0]["score"]
    assert found["flops"] == pytest.approx(np.mean([r["flops_stage1"] + r["flops_stage2"] for r in rows]))
    assert totals(rows[1:])["score"] is None and "no score" in closing(totals(rows[1:]))


def test_text_stands_in_columns(make_allocator, cases):
    (row,) = answer_all(make_allocator(), cases[:1], price=0.5)
    row |= {"answer": "two\nlines", "score": 1.0}
    assert line(row).endswith("case0: two lines  (score 1.000)")
    assert line(row).index("  case0") == head().index("  case:")
    assert "no answer in 'x'" in line({**row, "answer": None, "completion": "x"})
