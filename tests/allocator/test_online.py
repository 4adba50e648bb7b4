from __future__ import annotations

import pytest
import torch

from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.online import AllocatorLearner, PolicyLearner, ValueLearner
from frugalpath.allocator.policy import PolicyConfig, PolicyNetwork, explored
from frugalpath.allocator.value import ValueNetwork
from tests.conftest import LADDER, WIDTH
from tests.rl.conftest import assert_same_weights, whole_and_resumed

COST = (0.1, 0.3, 1.0)
SHAPE = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64}


def make(form: str, look: AllocatorInputs | None = None, objective: str = "linear", target=None, **options):
    torch.manual_seed(1)
    aim = Objective(objective, LADDER, COST, target)
    if form == "policy":
        return PolicyLearner(PolicyNetwork(PolicyConfig((0.01, 1.0), **SHAPE)), look, aim, **options)
    return ValueLearner(ValueNetwork(AllocatorConfig(**SHAPE)), look, aim, **options)


class Planted:
    """Cases as looks: dark ones are solved by any budget; a larger one brings light ones the more, the lighter."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, count: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        light = torch.rand(count, generator=self.generator) * 2 - 1
        look = 0.3 * torch.randn(count, 1, 5, WIDTH, generator=self.generator) + 2 * light[:, None, None, None]
        gain = light.clamp_min(0)[:, None] * torch.tensor([0.0, 0.5, 1.0])
        return look, torch.full((count, 3), 5), 1 - light.clamp_min(0)[:, None] + gain


def train(learner: AllocatorLearner, steps: int, count: int = 4) -> list[dict[str, float]]:
    """Updates on drawn budgets of planted cases."""
    world, logs = Planted(), []
    for _ in range(steps):
        look, question, scores = world.batch()
        price = learner._prices(len(look))
        rungs = learner._draw(look, question, price, count)
        logs.append(learner.update(look, question, rungs, scores.gather(1, rungs), price))
    return logs


@pytest.mark.parametrize("form", ["value", "policy"])
def test_draws_without_a_score_are_left_out(form):
    look, question, scores = Planted().batch(8)
    rungs = torch.tensor([[0, 1, 2]] * 8)
    price = torch.full((8,), 0.1)
    part, whole = make(form), make(form)
    for learner in (part, whole):
        for module in learner.allocator.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    some = torch.cat([scores[:4], torch.full((4, 3), torch.nan)])
    found = part.update(look, question, rungs, some, price)
    known = whole.update(look[:4], question[:4], rungs[:4], scores[:4], price[:4])
    assert found == pytest.approx(known)
    for name, value in whole.allocator.state_dict().items():
        torch.testing.assert_close(part.allocator.state_dict()[name], value)
    before = {n: v.clone() for n, v in part.allocator.state_dict().items()}
    assert part.update(look, question, rungs, torch.full((8, 3), torch.nan), price) == {}
    assert all(torch.equal(v, before[n]) for n, v in part.allocator.state_dict().items())


def test_single_draws_without_a_score_are_left_out_of_values():
    look, question, scores = Planted().batch(8)  # dropout is drawn alike in both
    scores[:, 1] = torch.nan
    found = make("value").update(look, question, torch.tensor([[0, 1, 2]] * 8), scores)
    known = make("value").update(look, question, torch.tensor([[0, 2]] * 8), scores[:, [0, 2]])
    assert found["loss"] == pytest.approx(known["loss"]) and found["score"] == pytest.approx(known["score"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_policy_is_learnt_from_draws_for_every_price(kind):
    learner = make("policy", kind=kind)
    look, question, scores = Planted().batch(400)

    def worth(price: float) -> float:
        chosen = learner.allocator.choose(look, question, price)
        return learner.objective(scores, price).gather(1, chosen[:, None]).mean().item()

    train(learner, 200)
    for price in (0.03, 0.2, 0.6):
        constant = learner.objective(scores, price).mean(0).max().item()
        best = learner.objective(scores, price).max(1).values.mean().item()
        assert worth(price) > best - 0.35 * (best - constant) - 0.005, price


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value", "policy"])
def test_dual_meets_its_target_cost(form):
    rate = {"value": 5e-3, "policy": 2e-3}[form]
    learner = make(form, objective="dual", target=0.3, price=0.05, learning_rate=rate)
    logs = train(learner, 200)
    assert sum(row["cost"] for row in logs[-100:]) / 100 == pytest.approx(0.3, abs=0.03)
    assert logs[0]["price"] == 0.05 != logs[-1]["price"] > 0


@pytest.mark.parametrize("form", ["value", "policy"])
def test_a_saved_learner_goes_on_as_if_it_had_not_stopped(form, tmp_path):
    learner, other = (make(form, objective="dual", target=0.3) for _ in range(2))
    train(learner, 3)
    learner.save(tmp_path)
    other.load(tmp_path)
    assert other.price == learner.price != 0.1
    for each in (learner, other):
        torch.manual_seed(7)
        train(each, 2)
    resumed, unstopped = other.allocator.state_dict(), learner.allocator.state_dict()
    assert all(torch.equal(resumed[n], unstopped[n]) for n in unstopped)


def test_draws_of_a_policy_explore_at_prices_of_the_range(performer, cases):
    config = PolicyConfig((0.01, 1.0), **SHAPE)
    learner = make("policy", AllocatorInputs(performer, config), explore=0.3)
    with torch.no_grad():
        learner.allocator.head[-1].bias.copy_(torch.tensor([20.0, -20.0, -20.0]))
    drawn = learner.draw(cases[:4], 2000)
    assert drawn.price.shape == (4,) and drawn.price.unique().numel() == 4
    share = torch.stack([(drawn.rungs == k).float().mean(1) for k in range(3)], 1)
    assert (share - explored(torch.tensor([[1.0, 0.0, 0.0]]), 0.3)).abs().max() < 0.05
    look, question = learner.look(cases[:4])
    assert torch.equal(drawn.look, look) and torch.equal(drawn.question, question)


def test_metrics_tell_the_ways_of_collapse():
    learner = make("policy", objective="birr")
    learner.objective = Objective("birr", (1, 4, 256), COST)
    look, question, scores = Planted().batch(20)
    rungs = torch.zeros(20, 2, dtype=torch.long)
    metrics = learner.update(look, question, rungs, scores.gather(1, rungs))
    for key in ("smallest_budget", "largest_budget", "below_cap", "largest_share"):
        assert 0 <= metrics[key] <= 1
    assert metrics["image_information"] >= 0 and "price" not in metrics
    question = torch.arange(1, 21)[:, None].expand(20, 3)
    assert "image_information" not in learner.update(look, question, rungs, scores.gather(1, rungs))


@pytest.mark.slow
def test_the_joint_step_trains_and_resumes_a_policy(make_performer, make_trainer, tmp_path):
    starts = []

    def make(**own):
        trainer = make_trainer(make_performer(), form="policy", **own)
        starts.append(trainer.learner.allocator.state_dict()["shift.weight"].clone())
        return trainer

    whole, resumed = whole_and_resumed(make, tmp_path, 2, save_steps=2)
    assert isinstance(whole.learner, PolicyLearner)
    assert not torch.equal(starts[0], whole.learner.allocator.state_dict()["shift.weight"])
    assert_same_weights(whole, resumed)
