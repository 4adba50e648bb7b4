from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from frugalpath.allocator.fitting import fit_by_patient, fit_table
from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.value import ValueNetwork
from tests.conftest import LADDER, WIDTH


@pytest.fixture
def batch() -> list[torch.Tensor]:
    """Look, question, rungs and score of 6 cases with 4 drawn budgets each."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(6, 1, 5, WIDTH, generator=generator),
        torch.randint(1, 64, (6, 7), generator=generator),
        torch.randint(0, 3, (6, 4), generator=generator),
        torch.rand(6, 4, generator=generator),
    ]


@pytest.mark.slow
def test_a_saved_learner_goes_on_as_if_it_had_not_stopped(performer, make_learner, batch, tmp_path):
    learner, other, fresh = (make_learner(performer) for _ in range(3))
    for _ in range(3):
        learner.update(*batch)
    learner.save(tmp_path)
    other.load(tmp_path)
    fresh.allocator.load_state_dict(learner.allocator.state_dict())
    for each in (learner, other, fresh):
        torch.manual_seed(7)  # the same dropout
        each.update(*batch)
    resumed, unstopped = other.allocator.state_dict(), learner.allocator.state_dict()
    assert all(torch.equal(resumed[n], unstopped[n]) for n in unstopped)
    # Without the optimizer's moments the step is another one.
    assert not torch.equal(fresh.allocator.state_dict()["see.weight"], unstopped["see.weight"])


@pytest.mark.slow
def test_an_update_pulls_the_prediction_to_the_score(performer, make_learner, batch):
    learner = make_learner(performer, learning_rate=1e-2)
    look, question, _, _ = batch
    rungs = torch.tensor([[0, 1, 2]] * 6)
    score = torch.tensor([[0.0, 0.5, 1.0]] * 6)
    first = learner.update(look, question, rungs, score)
    for _ in range(150):
        last = learner.update(look, question, rungs, score)
    learner.allocator.eval()
    predicted = learner.allocator(look, question).sigmoid().mean(0)
    assert predicted.tolist() == pytest.approx([0, 0.5, 1], abs=0.1)
    assert last["loss"] < first["loss"]
    assert last["chosen_tokens"] == 16 and last["largest_share"] == 1
    assert last["drawn_tokens"] == pytest.approx(sum(LADDER) / 3)
    assert last["score"] == pytest.approx(0.5)


def test_a_rung_that_was_not_drawn_is_not_taught(performer, make_learner, batch):
    learner = make_learner(performer)
    head = learner.allocator.head[-1]
    learner.update(batch[0], batch[1], torch.zeros(6, 4, dtype=torch.long), batch[3])
    assert head.weight.grad[0].abs().sum() > 0
    assert (head.weight.grad[1:] == 0).all() and (head.bias.grad[1:] == 0).all()


def test_drawing_tries_every_rung_however_sure_the_allocator(performer, make_learner, cases):
    learner = make_learner(performer, explore=0.3, price=0.0)
    with torch.no_grad():
        learner.allocator.head[-1].bias.copy_(torch.tensor([-20.0, -20.0, 20.0]))
    drawn = learner.draw(cases[:4], 1000)
    assert drawn.rungs.shape == (4, 1000)
    for row in drawn.rungs:
        share = torch.bincount(row, minlength=3) / 1000
        # Uniform draws are 30 %, a third of them each rung's; the standard error is under 0.013.
        assert share.tolist() == pytest.approx([0.1, 0.1, 0.8], abs=0.05)


def test_drawing_follows_the_price(performer, make_learner, cases):
    dear = make_learner(performer, explore=0.0, price=100.0)
    assert (dear.draw(cases, 20).rungs == 0).all()
    free = make_learner(performer, explore=0.0, price=-100.0)
    assert (free.draw(cases, 20).rungs == len(LADDER) - 1).all()


def test_the_budgets_of_an_image_differ(performer, make_learner, cases):
    learner = make_learner(performer, explore=0.0, price=100.0)
    for rungs in learner.draw(cases, len(LADDER)).rungs.tolist():
        assert sorted(rungs) == list(range(len(LADDER)))


def test_drawn_inputs_are_those_of_the_look(performer, make_learner, cases):
    learner = make_learner(performer)
    drawn = learner.draw(cases[:3], 2)
    look, question = learner.look(cases[:3])
    assert torch.equal(drawn.look, look) and torch.equal(drawn.question, question)


def test_a_planted_table_is_learnt():
    """Cases that look dark are solved by any budget, light ones by the largest only; question 9 is never solved."""
    generator = torch.Generator().manual_seed(0)
    count = 300
    light = torch.rand(count, generator=generator) < 0.5
    hopeless = torch.rand(count, generator=generator) < 0.3
    look = torch.randn(count, 1, 5, WIDTH, generator=generator) + 3.0 * light[:, None, None, None]
    question = torch.where(hopeless[:, None], 9, 5).expand(count, 4)
    solved = torch.stack([~light, ~light, torch.ones(count, dtype=torch.bool)], 1) & ~hopeless[:, None]
    torch.manual_seed(0)
    config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=32)
    allocator = ValueNetwork(config)
    losses = fit_table(allocator, look[:200], question[:200], solved[:200].float(), epochs=40, learning_rate=1e-2)
    assert len(losses) == 40 and losses[-1] < 0.2 * losses[0]
    assert not allocator.training
    held_out = slice(200, None)
    rungs = allocator.choose(look[held_out], question[held_out], 0.2, torch.tensor([0.1, 0.3, 1.0]))
    expected = torch.where(light & ~hopeless, 2, 0)[held_out]
    assert (rungs == expected).float().mean() > 0.95


def test_a_fit_is_repeatable():
    config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=32)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        allocator = ValueNetwork(config)
        look, question, scores = torch.randn(20, 1, 5, WIDTH), torch.randint(1, 32, (20, 3)), torch.rand(20, 3)
        found.append(fit_table(allocator, look, question, scores, epochs=3, batch_size=8))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_fit_stops_before_it_learns_noise_by_heart():
    """Scores that nothing tells: the held-out loss soon rises, and the predictions stay near the mean of each rung."""
    generator = torch.Generator().manual_seed(0)
    count, chance = 120, torch.tensor([0.2, 0.5, 0.8])
    look = torch.randn(count, 1, 5, WIDTH, generator=generator)
    question = torch.full((count, 4), 5)
    scores = (torch.rand(count, 3, generator=generator) < chance).float()
    torch.manual_seed(0)
    config = AllocatorConfig(
        ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=64, buckets=32, dropout=0.0, look_dropout=0.0
    )
    start = ValueNetwork(config)
    before = copy.deepcopy(start.state_dict())
    patients = [f"p{i // 2}" for i in range(count)]
    allocator, values, losses = fit_by_patient(start, look, question, scores, patients, epochs=30, learning_rate=5e-3)
    best = int(np.argmin(losses))
    assert losses[-1] > losses[best] + 0.2, "longer fits do worse on held-out patients"
    assert values.shape == (count, 3) and np.abs(values.mean(0) - chance.numpy()).max() < 0.12
    whole = copy.deepcopy(start)
    fit_table(whole, look, question, scores, epochs=best + 1, learning_rate=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(allocator.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(before[k], v) for k, v in start.state_dict().items()), "the start is left as it was"
