"""A value allocator that asks the performer first: costs, and what was fitted read again."""

from __future__ import annotations

import numpy as np
import pytest

from models.allocators.glance import Glance
from rl.deciders.value import ValueDecider, fit_value
from rl.recipe import AllocatorOptions
from tests.rl.planted import BUDGETS, PRICES, planted


@pytest.fixture
def world(make_performer, cases, tmp_path):
    return planted(make_performer, cases, tmp_path, look_state=5, look_confidence=5)


def fit(world) -> ValueDecider:
    stages, performer, allocator = world
    return fit_value(stages, performer, allocator, stages.table("grpo", performer, "val"))


def test_what_is_decided_from_the_table_is_decided_for_the_cases(world):
    decider = fit(world)
    assert decider.allocator.config.state_dim == decider.performer.shape.hidden + 2
    for price in PRICES:
        decided = decider.decide("test", price)
        rungs, look = decider.choose(decider.stages.splits["test"], price)
        np.testing.assert_array_equal(rungs, decided.rungs)
        np.testing.assert_allclose(look, decided.look)
    assert (decider.decide("test", 3.0).rungs == 1).all(), "at a high price where one has looked already"


def test_a_glance_is_paid_for_less_what_the_answer_takes_over(world):
    decider = fit(world)
    stages, performer, _ = world
    case = stages.splits["test"][0]
    glance = Glance(performer, 5, True, True)
    own = decider.allocator.flops(1)
    costs = [decider._glance(case, rung) for rung in range(3)]
    prompts = [performer.prompt(case, b) for b in BUDGETS]
    shape, opened = performer.shape, len(prompts[1]) + 3
    assert costs[1] == pytest.approx(shape.read(opened) - shape.read(len(prompts[1]))), "the opening alone"
    assert costs[0] > costs[2] > costs[1], "all five tokens are among the 21, one of them is the smallest's"
    assert max(costs) < glance.flops(case)
    assert decider._look_flops([case]) == own
    # The rule knows of it: going to where one has looked already is cheaper.
    plain = stages.rung_cost(performer)
    assert (np.array(decider.rung_cost) < plain).all()
    assert decider.rung_cost[1] < decider.rung_cost[0]


def test_a_fit_is_read_again(world):
    first, again = fit(world), fit(world)
    assert again.allocator.config.look_state == 5
    np.testing.assert_array_equal(first.predicted("val"), again.predicted("val"))
    np.testing.assert_allclose(first.predicted("test"), again.predicted("test"), atol=1e-6)


def test_without_a_glance_a_look_costs_its_network(make_performer, cases, tmp_path):
    decider = fit(planted(make_performer, cases, tmp_path))
    assert decider.allocator.beside is None
    decided = decider.decide("test", 0.1)
    np.testing.assert_array_equal(decided.look, [decider.allocator.flops(n) for n in (1, 1, 1, 2)])
    assert AllocatorOptions().look_state is None and AllocatorOptions().look_confidence is None
