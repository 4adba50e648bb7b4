"""The network that judges splits, and the performer that shows them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.allocators.split import SplitAllocator, SplitConfig
from models.build import PerformerConfig, build_performer
from models.share_out import share_out
from slides.errors import InputError
from tests.conftest import WIDTH, grid_features


@pytest.fixture
def allocator() -> SplitAllocator:
    torch.manual_seed(1)
    config = SplitConfig(
        slide_ladder=(0, 1, 4, 16), max_slides=4, look=(1, 4), feature_dim=WIDTH, width=16, buckets=64, share="split"
    )
    made = SplitAllocator(config).eval()
    with torch.no_grad():
        made.slide.weight.normal_()  # as if the look had been found to say something
    return made


@pytest.fixture
def seen() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Looks at three slides, questions and 7 splits of 20 made-up cases."""
    return torch.randn(20, 3, 5, WIDTH), torch.randint(1, 64, (20, 6)), torch.randint(0, 17, (20, 7, 3))


def test_a_saved_allocator_judges_alike(allocator, seen, tmp_path):
    allocator.save_pretrained(tmp_path)
    again = SplitAllocator.from_pretrained(tmp_path).eval()
    assert again.config.slide_ladder == [0, 1, 4, 16] and again.config.share == "split"
    assert torch.equal(again(*seen), allocator(*seen))


def test_slides_differ_by_their_numbers_alone(allocator, seen):
    look, question, budgets = seen
    order = [2, 0, 1]
    expected = allocator(look, question, budgets)
    assert torch.allclose(allocator(look[:, order], question, budgets[..., order]), expected, atol=1e-6)
    assert not torch.allclose(allocator(look[:, order], question, budgets), expected, atol=1e-3), "budgets have owners"
    with torch.no_grad():
        allocator.number.weight.normal_()
    numbered = allocator(look, question, budgets)
    assert not torch.allclose(allocator(look[:, order], question, budgets[..., order]), numbered, atol=1e-3)


def test_slides_that_are_not_there_and_other_splits_have_no_say(allocator, seen):
    look, question, budgets = seen
    padded = torch.cat([look, torch.zeros_like(look[:, :1])], 1)
    more = torch.cat([budgets, torch.full_like(budgets[..., :1], 9)], 2)
    assert torch.allclose(allocator(padded, question, more), allocator(*seen), atol=1e-6)
    assert torch.allclose(allocator(look, question, budgets[:, 2:4]), allocator(*seen)[:, 2:4], atol=1e-6)
    assert allocator(look[:, :1], question, budgets[..., :1]).shape == (20, 7)
    with pytest.raises(InputError, match=r"has 5 slides, the allocator knows 4; raise performer\.max_slides"):
        allocator(look[:, [0, 1, 2, 0, 1]], question, budgets[..., [0, 1, 2, 0, 1]])


def test_budgets_between_those_of_the_ladder_are_between_them(allocator):
    with torch.no_grad():
        allocator.budget.weight.copy_(torch.arange(4.0)[:, None].expand(4, 8))
    found = allocator.budget(torch.tensor([0, 1, 2, 4, 16, 50]))[:, 0].tolist()
    two = (torch.log2(torch.tensor(3.0)) - 1) / (torch.log2(torch.tensor(5.0)) - 1)
    assert found == pytest.approx([0, 1, 1 + float(two), 2, 3, 3])


def test_judging_every_split_costs_less_than_a_fiftieth_of_the_cheapest_answer(cases, make_bank):
    """At the default shapes: features of 1,280, a performer of 3 narrow layers, three slides at a token each."""
    wide = {f"wide{k}": dataclasses.replace(grid_features(2, 2), features=torch.randn(4, 1280).numpy()) for k in "abc"}
    case = dataclasses.replace(cases[0], images=tuple(wide))
    performer = build_performer(PerformerConfig(compressors=["keep"], aligner="mlp"), [case], make_bank(wide))
    answer = performer.flops(performer.prompt(case, 3), 8)
    allocator = SplitAllocator(SplitConfig(look=[1], share="split"))
    assert allocator.flops(3, 5**3) < 0.02 * answer
    hidden, narrow = 32, 16
    tokens = 5 * hidden * (3 * hidden + 1)
    rows = narrow * (1280 + hidden)
    summary = 5 * (64 + 10)
    assert allocator.flops(3, 10) == 2 * (3 * (rows + tokens) + 2 * 64 * hidden + summary + 10 * hidden * 7)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_budgets_of_slides_are_shares_of_their_sum(budgets):
    assert share_out(sum(budgets), budgets, [1000] * len(budgets)) == budgets
    assert share_out(sum(budgets), budgets, budgets) == budgets, "also where it is all that they give"


@pytest.mark.parametrize("split", [(1, 4, 16), (0, 5, 0), (36, 0, 2), (7, 7, 7)])
def test_a_performer_shows_each_slide_at_its_own_budget(performer, cases, split):
    case = dataclasses.replace(cases[0], images=("field0", "field1", "field2"))
    views = performer.see(case, sum(split), split)
    assert [v.budget for v in views] == [b for b in split if b]
    shown = [i for i, b in enumerate(split) if b]
    assert [v.source for v in views] == [case.images[i] for i in shown]
    assert [v.slide for v in views] == shown, "slides keep their numbers"
    (answer,) = performer.answer([case], [sum(split)], 4, weights=[split])
    assert answer.visual == sum(map(len, views))
    assert performer.see(case, 0, (0, 0, 0)) == []
