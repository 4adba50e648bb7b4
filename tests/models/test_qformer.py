from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.chain import Chain
from frugalpath.models.compressors.qformer import QFormer

SMALL = {"queries": 6, "width": 16, "layers": 3, "heads": 2}


def rows(n: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    """A slide of n patches (n, dim + 4), each of size 1."""
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(n, dim, generator=draw), torch.rand(n, 3, generator=draw), torch.ones(n, 1)], 1)


@pytest.fixture
def qformer() -> QFormer:
    return QFormer(8, **SMALL).eval()


@pytest.mark.parametrize("budget", [1, 4, 6, 50])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_the_size_of_the_output_does_not_depend_on_the_patches(qformer, n, budget):
    out = qformer(Tokens.from_rows([rows(n), rows(n, seed=1)]), budget)
    assert out.features.shape == (2, min(budget, 6), 16) == (2, qformer.count(n, budget), qformer.out_dim)
    assert out.place.unique(dim=1).tolist() == [[[0.5, 0.5, 1.0]]] * 2
    assert (out.size == 1).all()


@torch.no_grad()
def test_padding_and_the_order_of_patches_do_not_matter(qformer):
    slide = rows(9)
    alone = qformer(Tokens.from_rows([slide]), 6).features
    padded = qformer(Tokens.from_rows([slide, rows(40, seed=1)]), 6).features[:1]
    turned = qformer(Tokens.from_rows([slide.flip(0)]), 6).features
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(turned, alone)
    other = qformer(Tokens.from_rows([rows(9, seed=2)]), 6).features
    assert (other - alone).abs().max() > 1e-3, "it looks at the patches"


@torch.no_grad()
def test_a_token_of_three_patches_is_read_as_three(qformer):
    slide = rows(5)
    merged = slide.clone()
    merged[0, -1] = 3
    thrice = torch.cat([slide, slide[:1], slide[:1]])
    out = [qformer(Tokens.from_rows([s]), 6).features for s in (merged, thrice, slide)]
    torch.testing.assert_close(out[0], out[1])
    assert (out[0] - out[2]).abs().max() > 1e-4


@torch.no_grad()
def test_the_queries_differ_from_the_start(qformer):
    out = qformer(Tokens.from_rows([rows(9)]), 6).features[0]
    assert torch.pdist(out).min() > 1e-2


def test_cross_attention_stands_in_every_second_block(qformer):
    blocks = qformer.transformer.encoder.layer
    assert [block.has_cross_attention for block in blocks] == [True, False, True]


@torch.no_grad()
def test_of_too_many_patches_evenly_spaced_ones_are_read(caplog):
    qformer = QFormer(8, **SMALL, patches=10).eval()
    long, short = rows(25), rows(4, seed=1)
    with caplog.at_level(logging.WARNING):
        out = qformer(Tokens.from_rows([long, short]), 6).features
        qformer(Tokens.from_rows([long]), 6)
    assert [r.getMessage() for r in caplog.records] == [
        "a slide of 25 patches: the Q-Former reads 10 of them, evenly spaced"
    ]
    kept = long[[0, 2, 5, 7, 10, 12, 15, 17, 20, 22]]
    torch.testing.assert_close(out, qformer(Tokens.from_rows([kept, short]), 6).features)
    assert qformer.flops(25, 6) == qformer.flops(10, 6)


@pytest.mark.parametrize(("n", "budget", "layers"), [(5, 6, 3), (40, 2, 4), (300, 6, 1)])
def test_the_stated_flops_are_those_that_run(n, budget, layers):
    qformer = QFormer(8, **{**SMALL, "layers": layers}).eval().requires_grad_(False)
    qformer.transformer.set_attn_implementation("eager")  # the counter does not know the fused kernel of a CPU
    with FlopCounterMode(display=False) as counter:
        qformer(Tokens.from_rows([rows(n)]), budget)
    assert qformer.flops(n, budget) == counter.get_total_flops()


def test_every_parameter_learns(qformer):
    qformer.train()
    out = qformer(Tokens.from_rows([rows(9), rows(5, seed=1)]), 6)
    out.features.square().sum(-1).sin().sum().backward()
    # Keys' biases move all scores of a query alike, which a softmax does not see.
    still = [k for k, p in qformer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [k for k in still if not k.endswith("key.bias")]


def test_the_published_shape_is_the_default():
    with torch.device("meta"):
        qformer = QFormer(384)
    config = qformer.transformer.config
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert (qformer.most, *shape) == (32, 768, 12, 12, 3072)
    assert qformer.patches == 10240 and config.initializer_range == 0.02


def test_a_recipe_names_it():
    chain = Chain(["pool", {"name": "qformer", **SMALL}], dim=8, hidden=32)
    out = chain(Tokens.from_rows([rows(9)]), 3)
    assert out.features.shape == (1, 3, 16) and chain.count(9, 3) == 3 and chain.out_dim == 16
    assert chain.flops(9, 3) == chain.learned[0].flops(9, 3)


@pytest.mark.parametrize(
    ("options", "message"), [({"heads": 3}, "3 heads do not divide a width of 16"), ({"queries": 0}, "queries is 0")]
)
def test_a_shape_that_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        QFormer(8, **{**SMALL, **options})
