from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.resampler import Resampler

DIM, LATENTS, WIDTH = 10, 8, 16


def slides(*counts: int, seed: int = 0) -> Tokens:
    """Made-up tokens, of size 1 to 3, in any number."""
    made = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat(
            [
                torch.randn(n, DIM, generator=made),
                torch.rand(n, 3, generator=made),
                torch.randint(1, 4, (n, 1), generator=made).float(),
            ],
            1,
        )
        for n in counts
    ]
    return Tokens.from_rows(rows)


@pytest.fixture(scope="module")
def resampler() -> Resampler:
    torch.manual_seed(0)
    made = Resampler(DIM, LATENTS, WIDTH, layers=2, heads=4)
    torch.nn.init.normal_(made.latents)  # latents that differ
    return made.eval()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 12))
def test_what_comes_out_is_as_large_whatever_comes_in(resampler, counts, budget):
    out = resampler(slides(*counts), budget)
    n = resampler.count(max(counts), budget)
    assert n == min(budget, LATENTS)
    assert out.features.shape == (len(counts), n, WIDTH) and out.size.eq(1).all()
    assert out.place.shape == (len(counts), n, 3) and (out.place == torch.tensor([0.5, 0.5, 1.0])).all()


@given(st.integers(1, 30), st.integers(0, 99), st.integers(1, 8), st.integers(1, 30))
def test_order_neighbours_and_padding_change_nothing(resampler, n, seed, budget, more):
    alone = slides(n, seed=seed)
    expected = resampler(alone, budget).features[0]
    order = torch.randperm(n)
    mixed = Tokens(alone.features[:, order], alone.place[:, order], alone.size[:, order])
    torch.testing.assert_close(resampler(mixed, budget).features[0], expected, atol=1e-5, rtol=1e-4)
    beside = Tokens.from_rows([alone.rows()[0], slides(n + more, seed=seed + 1).rows()[0]])
    torch.testing.assert_close(resampler(beside, budget).features[0], expected, atol=1e-5, rtol=1e-4)
    # A neighbour that is padding alone, and padding that is not zero.
    padding = Tokens(torch.randn(2, n + more, DIM), torch.rand(2, n + more, 3), torch.zeros(2, n + more))
    for part in ("features", "place", "size"):
        getattr(padding, part)[0, :n] = getattr(alone, part)[0]
    out = resampler(padding, budget).features
    torch.testing.assert_close(out[0], expected, atol=1e-5, rtol=1e-4)
    assert out.isfinite().all()


def test_a_token_of_size_k_counts_as_k_tokens(resampler):
    tokens = slides(6)
    copies = Tokens.from_rows(
        [torch.cat([row.repeat(int(row[-1]), 1) for row in tokens.rows()[0]]).index_fill(1, torch.tensor(-1), 1.0)]
    )
    copies.size.fill_(1.0)
    torch.testing.assert_close(
        resampler(copies, LATENTS).features, resampler(tokens, LATENTS).features, atol=1e-5, rtol=1e-4
    )


def test_tokens_and_places_are_heard_and_gradients_reach_all(resampler):
    tokens = slides(5)
    features, place = tokens.features.requires_grad_(), tokens.place.requires_grad_()
    resampler.zero_grad()
    out = resampler(Tokens(features, place, tokens.size), 5).features
    out.pow(3).sum().backward()
    assert features.grad.norm(dim=2).gt(0).all() and place.grad.norm(dim=2).gt(0).all()
    for name, parameter in resampler.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    used = resampler.latents.grad.norm(dim=1) > 0
    assert used.tolist() == [True] * 5 + [False] * 3, "a budget is the first latents"


@pytest.mark.parametrize(("n", "budget"), [(1, 1), (37, 5), (64, 8), (64, 50)])
def test_the_formula_counts_what_torch_counts(resampler, n, budget):
    tokens = slides(n)
    # Of the kernels for a CPU, the counter knows the plain one alone.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        resampler(tokens, budget)
    assert resampler.flops(n, budget) == counter.get_total_flops()


def test_made_on_meta_and_filled_it_is_the_same(resampler):
    with torch.device("meta"):
        empty = Resampler(DIM, LATENTS, WIDTH, layers=2, heads=4)
    assert {p.device.type for p in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(resampler.state_dict())
    tokens = slides(7, 3)
    assert torch.equal(filled(tokens, 4).features, resampler(tokens, 4).features)


def test_reset_sets_the_latents():
    made = Resampler(64, 200, 64)
    torch.nn.init.zeros_(made.latents)
    made.reset()
    assert made.latents.std().item() > 0
    again = made.latents.detach().clone()
    made.reset()
    assert not torch.equal(made.latents, again)


def test_half_precision_runs(resampler):
    low = Resampler(DIM, LATENTS, WIDTH, layers=2, heads=4).to(torch.bfloat16)
    tokens = slides(9, 4)
    out = low(Tokens(tokens.features.bfloat16(), tokens.place, tokens.size), 4)
    assert out.features.dtype == torch.bfloat16 and out.features.isfinite().all()


@pytest.mark.parametrize("options", [{"width": 15, "heads": 4}, {"latents": 0}, {"layers": 0}])
def test_shapes_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match="resampler"):
        Resampler(DIM, **options)


def test_a_budget_below_one_is_refused(resampler):
    with pytest.raises(ValueError, match="at least 1"):
        resampler(slides(3), 0)
