from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from frugalpath.allocator.fitting import fit_by_patient, fit_table
from frugalpath.allocator.objectives import Objective, settle_price
from frugalpath.allocator.online import advantages, sampled_loss
from frugalpath.allocator.policy import ExpectedReward, PolicyConfig, PolicyNetwork, expected_reward
from tests.conftest import LADDER, WIDTH

COST = (0.1, 0.3, 1.0)
LINEAR = Objective("linear", LADDER, COST)


def make_policy(prices=(0.01, 1.0), **options) -> PolicyNetwork:
    torch.manual_seed(0)
    shape = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 32}
    return PolicyNetwork(PolicyConfig(prices, **{**shape, **options}))


def planted(count: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Look, question and scores: dark cases are solved by any budget, light ones gain half by each larger budget."""
    generator = torch.Generator().manual_seed(0)
    light = torch.rand(count, generator=generator) < 0.5
    look = torch.randn(count, 1, 5, WIDTH, generator=generator) + 3.0 * light[:, None, None, None]
    scores = torch.where(light[:, None], torch.tensor([0.0, 0.5, 1.0]), torch.ones(3))
    return look, torch.full((count, 4), 5), scores


# The gradient.


def test_the_exact_gradient_is_that_of_finite_differences():
    allocator = make_policy(dropout=0.0, look_dropout=0.0).double().eval()
    generator = torch.Generator().manual_seed(1)
    look = torch.randn(7, 1, 5, WIDTH, generator=generator, dtype=torch.float64)
    question = torch.randint(1, 32, (7, 4), generator=generator)
    price = torch.rand(7, generator=generator, dtype=torch.float64)
    reward = LINEAR(torch.rand(7, 3, generator=generator, dtype=torch.float64), price[:, None])

    def value() -> torch.Tensor:
        return expected_reward(allocator(look, question, price), reward, entropy=0.05)

    value().backward()
    step, checked = 1e-6, 0
    for name in ("see.weight", "question.weight", "head.2.weight", "head.4.bias", "shift.weight"):
        weight = allocator.get_parameter(name)
        for at in weight.grad.abs().flatten().topk(3).indices:
            flat = weight.data.view(-1)
            before = flat[at].item()
            ends = []
            for side in (1, -1):
                flat[at] = before + side * step
                ends.append(value().item())
            flat[at] = before
            numeric, exact = (ends[0] - ends[1]) / (2 * step), weight.grad.view(-1)[at].item()
            assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-9) and abs(exact) > 1e-7
            checked += 1
    assert checked == 15


def test_expected_reward_and_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert expected_reward(logits, torch.tensor([[1.0, 0.2]])).item() == pytest.approx(0.25 + 0.75 * 0.2)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert expected_reward(logits, torch.zeros(1, 2), 0.5).item() == pytest.approx(0.5 * entropy)


# Its samples.


@pytest.fixture
def toy() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and rewards of 3 cases at 4 rungs."""
    generator = torch.Generator().manual_seed(2)
    logits, reward = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, reward + 2.0  # without a baseline the spread would be large


def sampled(toy, explore: float, count: int, entropy: float = 0.0) -> torch.Tensor:
    """Gradients (count, 3, 4) of the mean over cases, each from its own draws of 3 rungs."""
    logits, reward = toy
    many = logits.repeat(count, 1).requires_grad_()
    behaviour = many.detach().softmax(-1) * (1 - explore) + explore / 4
    rungs = torch.multinomial(behaviour, 3, replacement=True, generator=torch.Generator().manual_seed(3))
    loss = sampled_loss(many, rungs, reward.repeat(count, 1).gather(1, rungs), "rloo", entropy, behaviour)
    (-loss * count).backward()
    return many.grad.view(count, 3, 4)


@pytest.mark.parametrize(("explore", "entropy"), [(0.0, 0.0), (0.4, 0.0), (0.4, 0.1)])
def test_the_mean_of_sampled_gradients_is_the_exact_one(toy, explore, entropy):
    logits = toy[0].clone().requires_grad_()
    expected_reward(logits, toy[1], entropy).backward()
    many = sampled(toy, explore, 40_000, entropy)
    error = many.std(0) / 40_000**0.5
    assert error.max() < 2e-3, "the standard error of the mean is small against the gradient"
    assert logits.grad.abs().max() > 0.05
    assert ((many.mean(0) - logits.grad).abs() < 4.5 * error + 1e-12).all()


def test_advantages_by_hand():
    reward = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0]])
    leave_one_out = advantages(reward)[0]
    assert leave_one_out[0].item() == pytest.approx(0.857143, abs=1e-6)
    assert leave_one_out[1].item() == pytest.approx(-0.285714, abs=1e-6)
    scaled = advantages(reward, "grpo")[0]
    assert (scaled[0].item(), scaled[1].item()) == pytest.approx((1.619835, -0.539945), abs=1e-6)
    assert not advantages(torch.full((2, 4), 0.3), "grpo").abs().gt(1e-3).any()


def test_the_other_draws_are_a_better_baseline_than_none(toy):
    logits, reward = toy
    many = logits.repeat(4000, 1)
    rungs = torch.multinomial(many.softmax(-1), 3, replacement=True)
    drawn = reward.repeat(4000, 1).gather(1, rungs)
    assert advantages(drawn).var() < 0.5 * drawn.pow(2).mean()


# Fits.


@pytest.mark.slow
def test_one_policy_is_right_at_every_price():
    look, question, scores = planted()
    allocator = make_policy()
    aim = ExpectedReward(LINEAR, (0.01, 1.0), entropy=0.01)
    losses = fit_table(allocator, look[:200], question[:200], scores[:200], 60, learning_rate=3e-3, aim=aim)
    assert losses[-1] < losses[0] and not allocator.training
    held = slice(200, None)
    for price in (0.02, 0.1, 0.3, 0.45, 0.9):
        chosen = allocator.choose(look[held], question[held], price)
        reward = LINEAR(scores[held], price)
        assert (reward.max(-1).values - reward.gather(1, chosen[:, None])[:, 0]).mean() < 0.02, price


@pytest.mark.slow
def test_entropy_keeps_a_policy_from_collapsing():
    """A reward that is better by a hair at one rung: without a bonus the policy settles on it."""
    look, question, _ = planted(120)
    scores = torch.tensor([0.5, 0.5, 0.56]).expand(120, 3)
    least = {}
    for entropy in (0.0, 0.05):
        allocator = make_policy((0.01, 0.01))
        aim = ExpectedReward(LINEAR, (0.01, 0.01), entropy)
        fit_table(allocator, look, question, scores, 150, learning_rate=3e-3, aim=aim)
        least[entropy] = allocator.probabilities(look, question, 0.01).min().item()
    # The best policy with a bonus is the softmax of reward over its weight.
    expected = (LINEAR(scores[:1], 0.01) / 0.05).softmax(-1).min().item()
    assert least[0.0] < 0.02
    assert least[0.05] == pytest.approx(expected, abs=0.1)


def test_the_bonus_fades():
    look, question, scores = planted(8)
    allocator = make_policy((0.1, 0.1), dropout=0.0, look_dropout=0.0)
    aim = ExpectedReward(LINEAR, (0.1, 0.1), entropy=0.5, decay=0.5)
    loss = [aim.loss(allocator, [look, question], scores, epoch).item() for epoch in (0, 1, 2)]
    assert loss[1] - loss[0] == pytest.approx(2 * (loss[2] - loss[1]), rel=1e-3) and loss[0] < loss[1]


@pytest.mark.slow
def test_choices_out_of_fold_hold_at_prices_between_those_of_the_grid():
    look, question, scores = planted(120)
    aim = ExpectedReward(LINEAR, (0.01, 1.0), entropy=0.01)
    patients = [f"p{i // 2}" for i in range(120)]
    allocator, values, losses = fit_by_patient(
        make_policy(), look, question, scores, patients, epochs=12, learning_rate=1e-2, aim=aim
    )
    assert values.shape == (120, 13, 3) and len(losses) == 12
    own = aim.predict(allocator, [look, question])
    for price in (0.0, 0.01, 0.037, 0.2, 0.66, 1.0, 3.0):
        direct = allocator.choose(look, question, price).numpy()
        assert (aim.rungs(own, price) == direct).mean() > 0.97, price
    reward = LINEAR(scores.double().numpy(), 0.2)
    found = np.take_along_axis(reward, aim.rungs(values, 0.2)[:, None], 1).mean()
    assert found > reward.mean(0).max() + 0.02, "better than the best static budget, out of fold"


@pytest.mark.slow
def test_a_price_is_settled_that_meets_a_target_cost():
    look, question, scores = planted()
    # The bonus keeps the policy from switching all at once, so that every cost between can be met.
    allocator = make_policy()
    fit_table(allocator, look, question, scores, 60, learning_rate=3e-3, aim=ExpectedReward(LINEAR, (0.01, 1.0), 0.1))

    def cost_at(price: float) -> float:
        return (allocator.probabilities(look, question, price) @ torch.tensor(COST)).mean().item()

    assert cost_at(0.01) > 0.45 > 0.35 > cost_at(1.0)
    for target in (0.35, 0.4, 0.45):
        price = settle_price(cost_at, target)
        assert cost_at(price) == pytest.approx(target, abs=0.01), target


def test_a_target_that_is_met_for_nothing_has_no_price():
    assert settle_price(lambda price: 0.2, 0.5) == 0.0
    assert settle_price(lambda price: max(0.1, 0.4 - price), 0.5) == 0.0


def test_where_the_cost_has_steps_the_nearest_is_taken():
    def cost_at(price: float) -> float:
        return 1.0 if price < 0.2 else 0.5 if price < 0.3 else 0.1

    for target, cost in ((0.45, 0.5), (0.2, 0.1), (0.9, 1.0), (0.05, 0.1)):
        assert cost_at(settle_price(cost_at, target)) == cost
