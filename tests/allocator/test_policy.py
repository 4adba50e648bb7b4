from __future__ import annotations

import pytest
import torch

from frugalpath.allocator.policy import BUMPS, PolicyConfig, PolicyNetwork, explored
from tests.conftest import LADDER, WIDTH


def make(prices=(0.01, 1.0), **options) -> PolicyNetwork:
    torch.manual_seed(1)
    shape = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64, "dropout": 0.5}
    allocator = PolicyNetwork(PolicyConfig(prices, **shape, **options)).eval()
    torch.nn.init.normal_(allocator.shift.weight, std=0.1)
    return allocator


@pytest.fixture
def allocator() -> PolicyNetwork:
    return make()


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor]:
    """Looks and questions of 50 made-up cases."""
    return torch.randn(50, 1, 5, WIDTH) * 3, torch.randint(0, 64, (50, 6))


def test_a_saved_policy_acts_alike(allocator, seen, tmp_path):
    allocator.standardise(seen[0] + 1)
    allocator.save_pretrained(tmp_path)
    again = PolicyNetwork.from_pretrained(tmp_path).eval()
    price = torch.rand(50)
    assert torch.equal(again(*seen, price), allocator(*seen, price))
    assert again.config.prices == [0.01, 1.0] and again.config.ladder == list(LADDER)


def test_a_new_policy_has_no_shift(seen):
    torch.manual_seed(0)
    fresh = PolicyNetwork(PolicyConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64))
    assert not fresh.shift.weight.any() and not fresh.shift.bias.any()


def test_the_price_has_a_say_within_its_range_only(allocator, seen):
    at = {p: allocator.probabilities(*seen, p) for p in (0.0, 0.001, 0.01, 0.1, 1.0, 5.0)}
    assert torch.equal(at[0.0], at[0.01]) and torch.equal(at[0.001], at[0.01]) and torch.equal(at[5.0], at[1.0])
    assert (at[0.01] - at[0.1]).abs().max() > 0.05 < (at[0.1] - at[1.0]).abs().max()
    assert torch.allclose(allocator.sweep(*seen, list(at)), torch.stack(list(at.values()), 1), atol=1e-6)
    each = torch.tensor([0.01, 1.0]).repeat(25)
    mixed = allocator.probabilities(*seen, each)
    assert torch.allclose(mixed[::2], at[0.01][::2], atol=1e-6) and torch.allclose(
        mixed[1::2], at[1.0][1::2], atol=1e-6
    )


def test_a_policy_for_one_price_reads_none(seen):
    single = make(prices=(0.1, 0.1))
    assert torch.equal(single.probabilities(*seen, 0.01), single.probabilities(*seen, 0.9))
    assert single.draw_prices(4).tolist() == pytest.approx([0.1] * 4)


def test_drawn_prices_are_even_on_a_logarithmic_scale(allocator):
    drawn = allocator.draw_prices(20_000)
    assert drawn.min() >= 0.01 and drawn.max() <= 1.0 + 1e-6
    counts = torch.histc(drawn.log10(), 4, -2, 0) / 20_000
    assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.02)  # the standard error is 0.003


def test_choices_are_the_most_probable_and_samples_follow_the_policy(allocator, seen):
    policy = allocator.probabilities(*seen, 0.2)
    assert torch.equal(allocator.choose(*seen, 0.2), policy.argmax(-1))
    assert torch.allclose(policy.sum(-1), torch.ones(50))
    drawn = allocator.sample(*seen, 0.2, 4000, explore=0.3)
    share = torch.stack([(drawn == k).float().mean(1) for k in range(3)], 1)
    assert (share - explored(policy, 0.3)).abs().max() < 0.04  # five standard errors
    assert explored(policy, 0.3).min() >= 0.1


def test_probabilities_are_without_dropout_and_leave_the_mode(allocator, seen):
    allocator.train()
    assert torch.equal(allocator.probabilities(*seen, 0.2), allocator.probabilities(*seen, 0.2))
    assert allocator.training


def test_bumps_cover_the_range(allocator):
    prices = torch.logspace(-2, 0, BUMPS)
    where = allocator._where(prices)
    assert where[:, :BUMPS].argmax(1).tolist() == list(range(BUMPS))
    assert torch.allclose(where.diagonal(), torch.ones(BUMPS), atol=1e-5)
    assert torch.allclose(where[:, BUMPS], prices)
