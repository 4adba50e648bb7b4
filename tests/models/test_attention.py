from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from frugalpath.models.attention import as_mask, decoder, dense_attention, implementation, shared_prefix_attention
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.qwen_vl import backbone


def tensors(count: int, heads: int, kv_heads: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(count, n, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def module(heads: int, kv_heads: int) -> torch.nn.Module:
    made = torch.nn.Module()
    made.num_key_value_groups = heads // kv_heads
    made.is_causal = True
    return made


@given(st.integers(1, 2), st.sampled_from([(1, 1), (4, 2)]), st.integers(1, 9), st.integers(1, 7), st.data())
def test_a_prefix_is_causal_and_the_rest_follows_its_mask(count, heads, prefix, rest, data):
    """Against attention of all positions with one whole mask."""
    length = prefix + rest
    bits = data.draw(st.lists(st.booleans(), min_size=count * rest * length, max_size=count * rest * length))
    tail = torch.tensor(bits).view(count, 1, rest, length)
    tail |= torch.eye(length, dtype=torch.bool)[prefix:]  # a query that sees nothing has no attention
    head = torch.ones(length, length).tril().bool()[:prefix].expand(count, 1, -1, -1)
    results = []
    for given_mask, options in ((tail, {"prefix_length": prefix}), (torch.cat([head, tail], 2), {})):
        parts = tensors(count, *heads, length)
        out, weights = shared_prefix_attention(module(*heads), *parts, given_mask, scaling=0.3, **options)
        assert weights is None and out.shape == (count, length, heads[0], 8)
        (out**2).sum().backward()
        results.append([out, *(p.grad for p in parts)])
    for ours, dense in zip(*results, strict=True):
        assert torch.allclose(ours, dense, atol=1e-10)


def test_without_a_prefix_it_is_the_stock_attention():
    parts = tensors(2, 4, 2, 5)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    ours = shared_prefix_attention(module(4, 2), *parts, mask)[0]
    assert torch.equal(ours, sdpa_attention_forward(module(4, 2), *parts, mask)[0])


def test_the_decoder_is_found_within_wrappers(qwen, performer):
    around = torch.nn.Module()
    around.module = qwen.model
    text = backbone(qwen.model).language_model
    adapted = get_peft_model(qwen.model, lora_config(PerformerConfig(family="qwen_vl", lora={"r": 2}), qwen.model))
    wrapped = torch.nn.Module()
    wrapped.module = adapted
    assert all(decoder(m) is text for m in (qwen.model, around, adapted, wrapped))
    assert decoder(performer.model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "within"),
    [("sdpa", "sdpa"), ("eager", "eager"), ("shared_prefix", "shared_prefix"), ("flex_attention", "sdpa")],
)
def test_attention_takes_a_dense_mask_for_a_while(performer, name, within):
    decoder(performer.model).set_attn_implementation(name)
    with pytest.raises(KeyError), dense_attention(performer.model):
        assert implementation(performer.model) == within
        raise KeyError
    assert implementation(performer.model) == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_added_to_the_scores(dtype):
    allowed = torch.tensor([[True, False], [True, True]])
    added = as_mask(allowed, dtype)
    assert added.dtype == dtype
    assert added.tolist() == [[0, torch.finfo(dtype).min], [0, 0]]
    assert torch.tensor([1.0, 9.0], dtype=dtype).add(added[0]).softmax(-1).tolist() == [1, 0]
