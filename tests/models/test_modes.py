"""Whatever happens meanwhile, a model is in the mode afterwards that it was in before."""

from __future__ import annotations

import pytest
import torch

from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.policy import PolicyConfig, PolicyNetwork
from frugalpath.allocator.value import ValueNetwork
from frugalpath.models.modes import evaluating
from frugalpath.models.reuse import Reader
from tests.conftest import LADDER, WIDTH

SHAPE = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64}


def broken(*args, **kwargs):
    raise ConnectionError("the disk is gone")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back(training):
    model = torch.nn.Dropout()
    model.train(training)
    with evaluating(model):
        assert not model.training
    assert model.training == training


@pytest.mark.parametrize("reads", ["answer", "reader"])
def test_a_performer_that_cannot_answer_goes_on_training(make_performer, cases, monkeypatch, reads):
    performer = make_performer()
    performer.model.train()
    monkeypatch.setattr(performer.processor.sight, "inputs", broken)
    with pytest.raises(ConnectionError):
        if reads == "answer":
            performer.answer(cases[:1], [4])
        else:
            Reader(performer, cases[0], 4).answer(4)
    assert performer.model.training


@pytest.mark.parametrize("form", ["value", "policy", "sweep"])
def test_an_allocator_that_cannot_choose_goes_on_training(form):
    look, wrong = torch.zeros(2, 1, 5, WIDTH + 1), torch.ones(2, 3, dtype=torch.long)
    if form == "value":
        allocator = ValueNetwork(AllocatorConfig(**SHAPE)).train()
        with pytest.raises(RuntimeError):
            allocator.choose(look, wrong, 0.1, torch.ones(3))
    else:
        allocator = PolicyNetwork(PolicyConfig((0.01, 1.0), **SHAPE)).train()
        with pytest.raises(RuntimeError):
            allocator.probabilities(look, wrong, 0.1) if form == "policy" else allocator.sweep(look, wrong, [0.1])
    assert allocator.training


def test_answers_that_are_not_there_are_told(performer, cases):
    with pytest.raises(RuntimeError, match="no answer was written to case0, case1"):
        performer.answer(cases[:2], [4, 4], batch_size=-1)
