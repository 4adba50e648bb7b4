from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.allocators.look import CheapLook
from models.allocators.network import AllocatorConfig
from models.allocators.value import ValueAllocator
from models.share_out import share_out
from models.visual import COLUMNS
from slides.errors import InputError
from tests.conftest import LADDER, WIDTH

COST = torch.tensor([0.1, 0.3, 1.0])


@pytest.fixture
def allocator() -> ValueAllocator:
    torch.manual_seed(1)
    config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64, dropout=0.5)
    return ValueAllocator(config).eval()


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor]:
    """Looks and questions of 200 made-up cases."""
    return torch.randn(200, 1, 5, WIDTH) * 3, torch.randint(0, 64, (200, 6))


def test_a_saved_allocator_predicts_alike(allocator, seen, tmp_path):
    allocator.standardise(seen[0] + 1)
    allocator.save_pretrained(tmp_path)
    again = ValueAllocator.from_pretrained(tmp_path).eval()
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
    look, question = CheapLook(performer, allocator.config)(cases[:3])
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
    look, question = CheapLook(performer, allocator.config)([cases[0], cases[1], both])
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


# Shares of the slides of a case.


@pytest.fixture
def divider() -> ValueAllocator:
    torch.manual_seed(1)
    config = AllocatorConfig(ladder=LADDER, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64, share="attention")
    return ValueAllocator(config).eval()


def test_shares_are_equal_at_first_and_none_is_for_a_slide_that_is_not_there(divider, seen):
    look = torch.cat([seen[0], seen[0].roll(1, 0), torch.zeros_like(seen[0])], 1)
    shares = divider.divide(look, seen[1])
    assert torch.allclose(shares, torch.tensor([0.5, 0.5, 0.0]).expand(200, 3))
    with torch.no_grad():
        divider.shares.score.normal_(std=5)
    shares = divider.divide(look, seen[1])
    assert torch.allclose(shares.sum(1), torch.ones(200)) and (shares[:, 2] == 0).all()
    assert shares[:, :2].min() >= 0.25, "half is shared equally"
    assert shares[:, 0].std() > 0.01
    padded = divider(look, seen[1])
    assert torch.allclose(padded, divider(look[:, :2], seen[1]), atol=1e-6)


def test_the_slide_that_says_how_a_case_will_be_answered_gets_more(divider, seen):
    """The first feature of a case's only bright slide tells whether the performer is right; others mislead."""
    torch.manual_seed(0)
    look = torch.randn(400, 3, 5, WIDTH) * 0.1
    sign = torch.randint(2, (400, 3)) * 2.0 - 1
    look[..., 0] = 3.0 * sign[..., None]
    at, rows = torch.randint(3, (400,)), torch.arange(400)
    look[rows, at, :, 1] = 4.0
    question, target = torch.ones(400, 2, dtype=torch.long), ((sign[rows, at] + 1) / 2)[:, None].expand(-1, 3)
    divider.train()
    optimizer = torch.optim.AdamW(divider.parameters(), 1e-2)
    for _ in range(150):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(divider(look, question), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = divider.eval().divide(look, question)
    assert (shares.argmax(1) == at).float().mean() > 0.9
    assert shares.gather(1, at[:, None]).mean() > 0.5


def test_cases_are_divided_among_what_they_show(divider, performer, cases):
    both = dataclasses.replace(cases[0], images=("field0", "field1", "field2"))
    with torch.no_grad():
        divider.shares.score.normal_(std=3)
    look = CheapLook(performer, divider.config)
    alone, shares = look.divide(divider, [cases[1], both])
    assert alone == [1.0] and len(shares) == 3 and sum(shares) == pytest.approx(1)
    counts = [len(v) for v in performer.see(both, 16, shares)]
    assert sum(counts) <= 16 and counts != [6, 5, 5]
    assert [len(v) for v in performer.see(both, 12)] == [4, 4, 4]


def test_an_unknown_way_to_share_is_named():
    with pytest.raises(InputError, match="share: 'fair' is not known; known are equal, attention"):
        AllocatorConfig(share="fair")


@given(st.integers(0, 500), st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_a_budget_is_shared_out_whole(budget, weights):
    shares = share_out(budget, weights, [math.inf] * len(weights))
    assert sum(shares) == budget and min(shares) >= 0
    assert all(abs(s - budget * w / sum(weights)) < 1 + 1e-6 for s, w in zip(shares, weights, strict=True))


@given(st.integers(0, 60), st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 20)), min_size=1, max_size=6))
def test_what_one_cannot_take_goes_to_the_others(budget, slides):
    weights, room = zip(*slides, strict=True)
    shares = share_out(budget, weights, room)
    assert all(share <= most for share, most in zip(shares, room, strict=True))
    assert sum(shares) == min(budget, sum(room))
