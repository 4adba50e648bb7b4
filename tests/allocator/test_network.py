from __future__ import annotations

import dataclasses

import pytest
import torch

from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.allocator.value import ValueNetwork
from frugalpath.models.feature_bank import COLUMNS
from tests.conftest import LADDER, WIDTH

COST = torch.tensor([0.1, 0.3, 1.0])


@pytest.fixture
def allocator() -> ValueNetwork:
    torch.manual_seed(1)
    config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64, dropout=0.5)
    return ValueNetwork(config).eval()


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor]:
    """Looks and questions of 200 made-up cases."""
    return torch.randn(200, 1, 5, WIDTH) * 3, torch.randint(0, 64, (200, 6))


def test_a_saved_allocator_predicts_alike(allocator, seen, tmp_path):
    allocator.standardise(seen[0] + 1)
    allocator.save_pretrained(tmp_path)
    again = ValueNetwork.from_pretrained(tmp_path).eval()
    assert (tmp_path / "model.safetensors").is_file()
    assert torch.equal(again(*seen), allocator(*seen))
    assert again.config.ladder == list(LADDER) and again.config.look == [1, 4]


def test_the_choice_is_the_best_value_after_cost(allocator, seen):
    value = torch.sigmoid(allocator(*seen))
    for price in (0.0, 0.05, 5.0):
        expected = [max(range(3), key=lambda k: (row[k] - price * COST[k]).item()) for row in value]
        assert allocator.choose(*seen, price, COST).tolist() == expected
    per_case = torch.rand(200, 3)
    expected = (value - 0.2 * per_case).argmax(-1)
    assert torch.equal(allocator.choose(*seen, 0.2, per_case), expected)


def test_a_higher_price_never_raises_the_cost(allocator, seen):
    chosen = torch.stack([allocator.choose(*seen, p, COST) for p in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 10.0)])
    costs = COST[chosen]
    assert (costs.diff(dim=0) <= 0).all()
    assert len(set(costs.mean(1).tolist())) > 2, "the price has a say"
    assert (chosen[-1] == 0).all()


def test_choosing_is_without_dropout_and_leaves_the_mode(allocator, seen):
    allocator.train()
    first = allocator.choose(*seen, 0.05, COST)
    assert torch.equal(allocator.choose(*seen, 0.05, COST), first)
    assert allocator.training


def test_standardised_looks_have_mean_nought_and_deviation_one(allocator, seen):
    look = seen[0] * 4 + 7
    look[..., 2] = 3.0
    allocator.standardise(look)
    rows = ((look - allocator.mean) / allocator.std).flatten(0, 2)
    assert torch.allclose(rows.mean(0), torch.zeros(WIDTH), atol=1e-4)
    expected = torch.ones(WIDTH)
    expected[2] = 0.0
    assert torch.allclose(rows.std(0), expected, atol=1e-4)


def test_padding_of_the_question_has_no_say(allocator, seen):
    padded = torch.cat([seen[1], torch.zeros(200, 3, dtype=torch.long)], 1)
    assert torch.allclose(allocator(seen[0], padded), allocator(*seen), atol=1e-6)


def test_flops_are_those_of_its_matrices(allocator):
    narrow, tokens = 4, 5
    rows = tokens * 2 * WIDTH * narrow
    assert allocator.flops(1) == rows + 2 * (tokens * narrow + 16) * 16 + 2 * 16 * len(LADDER)
    assert allocator.flops(3) - allocator.flops(1) == 2 * rows


def test_the_look_is_the_pooled_tokens_of_the_smallest_budgets(allocator, performer, cases):
    look, question = AllocatorInputs(performer, allocator.config)(cases[:3])
    assert look.shape == (3, 1, 5, WIDTH)
    for row, case in zip(look, cases[:3], strict=True):
        pooled = [performer.bank.see(case.images[0], b).rows[:, :-COLUMNS] for b in (1, 4)]
        assert torch.equal(row[0], torch.cat(pooled))
    assert question.dtype == torch.long
    lengths = [len(performer.processor.tokenizer(c.prompt)["input_ids"]) for c in cases[:3]]
    assert (question > 0).sum(1).tolist() == lengths
    assert question.max() < allocator.config.buckets


def test_several_images_are_looked_at_one_by_one_and_count_the_same(allocator, performer, cases):
    both = dataclasses.replace(cases[0], images=("field0", "field1"))
    look, question = AllocatorInputs(performer, allocator.config)([cases[0], cases[1], both])
    assert look.shape == (3, 2, 5, WIDTH)
    assert not look[:2, 1].any(), "they have no second image"
    assert torch.equal(look[2], torch.stack([look[0, 0], look[1, 0]]))
    alone = allocator(look[:1, :1], question[:1])
    assert torch.allclose(allocator(look, question)[:1], alone, atol=1e-6)
    seen = allocator.see((look - allocator.mean) / allocator.std).flatten(2)
    assert torch.allclose(
        allocator(look, question)[2],
        allocator.head(torch.cat([seen[2].mean(0), allocator.question(question)[2]])),
        atol=1e-6,
    )
