"""Deciders over a miniature run: eight cases to fit on, as many to decide about."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.collapse import collapse
from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.policy import PolicyConfig, PolicyNetwork
from frugalpath.allocator.score_table import COLUMNS, ScoreTable
from frugalpath.allocator.value import ValueNetwork
from frugalpath.errors import InputError
from frugalpath.recipe.run import AllocatorOptions
from frugalpath.rl.pipeline import fit_allocator
from tests.conftest import LADDER, WIDTH

COST = (0.1, 0.3, 1.0)


class MiniRun:
    """As much of a run's data as allocators ask for: odd fields are answered by the largest budget alone."""

    def __init__(self, cases, folder, **options):
        rate = 3e-3 if options.get("form") == "policy" else 2e-2
        allocator = AllocatorOptions(**{"fit_epochs": 25, "fit_learning_rate": rate, "dropout": 0.0, **options})
        evaluation = SimpleNamespace(prices=[0.0, 0.1, 0.5])
        self.run = SimpleNamespace(
            ladder=list(LADDER),
            allocator=allocator,
            folder=folder,
            grpo=SimpleNamespace(seed=0),
            evaluation=evaluation,
        )
        many = [dataclasses.replace(c, id=f"{c.id}-{i}", patient=f"{c.patient}-{i}") for i in range(6) for c in cases]
        self.splits = {"val": many, "test": cases}

    def table(self, split) -> ScoreTable:
        cases = self.splits[split]
        odd = np.array([int(c.images[0][-1]) % 2 for c in cases], dtype=bool)[:, None]
        score = np.where(odd, [0.0, 0.0, 1.0], [1.0, 1.0, 1.0])
        columns = {k: np.broadcast_to(np.array(LADDER), score.shape) for k in COLUMNS}
        columns |= {"score": score, "flops": np.broadcast_to(1e6 * np.array(COST), score.shape)}
        ids, patients, questions = ([getattr(c, k) for c in cases] for k in ("id", "patient", "question"))
        return ScoreTable(ids, patients, questions, list(LADDER), text=[["a"] * 3] * len(cases), **columns)

    def trained(self, performer) -> TrainedRun:
        options = self.run.allocator
        objective = Objective(options.objective, LADDER, COST, options.target)
        return TrainedRun(self, performer, objective, {split: self.table(split) for split in self.splits})

    def start(self):
        torch.manual_seed(0)
        shape = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64, "dropout": 0.0}
        if self.run.allocator.form == "policy":
            return PolicyNetwork(PolicyConfig((0.01, 1.0), look_dropout=0.0, **shape))
        return ValueNetwork(AllocatorConfig(look_dropout=0.0, **shape))


@pytest.fixture
def make(performer, cases, tmp_path):
    def decider(**options):
        run = MiniRun(cases, tmp_path, **{"price_range": [0.01, 1.0], **options})
        return run, fit_allocator(run.trained(performer), run.start())

    return decider


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value", "policy"])
def test_a_fitted_allocator_spends_where_it_helps(make, performer, cases, form):
    _, decider = make(form=form)
    assert decider.form == form
    expected = [2 * (i % 2) for i in range(8)]
    for split in ("test", "val"):
        decided = decider.decide(split, 0.3)
        assert (decided.rungs == np.resize(expected, len(decided.rungs))).mean() > 0.9
        assert (decided.look > 0).all() and decided.cost.mean() < 0.7e6
    rungs, look = decider.choose(cases[:3], 0.3)
    assert rungs.tolist() == decider.decide("test", 0.3).rungs[:3].tolist() and len(look) == 3
    assert decider.settled is None and (decider.look_ms(cases[:2], 0.3) > 0).all()
    assert (decider.predicted("val") is None) == (form == "policy")
    assert collapse(decider) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value", "policy"])
def test_a_finished_fit_is_read_again(make, tmp_path, form):
    _, first = make(form=form)
    weights = tmp_path / "allocator" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    _, again = make(form=form)
    assert weights.stat().st_mtime_ns == written
    for split in ("val", "test"):
        for price in (0.0, 0.2, 0.7):
            assert (first.decide(split, price).rungs == again.decide(split, price).rungs).all()
    with pytest.raises(InputError, match="was made with other settings"):
        make(form=form, fit_learning_rate=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value", "policy"])
def test_dual_settles_the_price_on_validation_cases(make, form):
    _, decider = make(form=form, objective="dual", target=0.56)
    # Half of the cases at .1 and half at 1 cost .55, and the look a little.
    cost = decider.decide("val", decider.settled).cost.mean() / 1e6
    assert cost == pytest.approx(0.56, abs=0.06)


@pytest.mark.slow
def test_prices_at_which_nothing_is_worth_its_cost_are_told(make, performer):
    run, decider = make(form="value")
    run.run.evaluation.prices = [2.0, 5.0]
    (warning,) = collapse(decider)
    assert "100% of cases the smallest budget; lower allocator.price" in warning


def test_a_start_of_another_form_is_refused(make, performer, cases, tmp_path):
    run = MiniRun(cases, tmp_path, form="policy")
    run.run.allocator.form = "value"
    start = run.start()
    run.run.allocator.form = "policy"
    with pytest.raises(TypeError, match="no allocator of the form policy starts from a ValueNetwork"):
        fit_allocator(run.trained(performer), start)
