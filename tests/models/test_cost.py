from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from frugalpath.models.cost import DecoderShape, TowerShape

shapes = st.builds(
    DecoderShape,
    layers=st.integers(1, 4),
    hidden=st.integers(1, 8).map(lambda n: 16 * n),
    kv_width=st.integers(1, 4).map(lambda n: 8 * n),
    ffn=st.integers(1, 200),
    vocab=st.integers(1, 500),
)


def matmul(rows: int, inner: int, columns: int) -> int:
    """FLOPs of a matrix product."""
    return 2 * rows * inner * columns


def token(shape: DecoderShape, context: float) -> float:
    """FLOPs of one token in all layers, product by product, when it attends to `context` keys."""
    d, total = shape.hidden, 0.0
    for _ in range(shape.layers):
        total += matmul(1, d, d) + 2 * matmul(1, d, shape.kv_width) + matmul(1, d, d)  # query, key and value, output
        total += 2 * matmul(1, d, shape.ffn) + matmul(1, shape.ffn, d)  # gate and up, down
        total += 2 * context * d + 2 * context * d  # scores, weighted values
    return total


@given(shapes, st.integers(1, 30))
def test_prefill_is_the_sum_over_layers_and_tokens(shape, n):
    # A causal pass does half of the n x n attention: token i (from 1) meets i keys, itself counted as a half.
    brute = sum(token(shape, i - 0.5) for i in range(1, n + 1)) + matmul(1, shape.hidden, shape.vocab)
    assert shape.prefill(n) == pytest.approx(brute, rel=1e-12)


@given(shapes, st.integers(1, 20), st.integers(1, 30))
def test_decode_is_the_sum_over_generated_tokens(shape, generated, n):
    # The first token comes with the prefill; step t reads a cache of n + t keys, its own among them.
    brute = sum(token(shape, n + t) + matmul(1, shape.hidden, shape.vocab) for t in range(1, generated))
    assert shape.decode(generated, n) == pytest.approx(brute, rel=1e-12)


@given(shapes, st.integers(1, 10), st.integers(1, 10), st.integers(1, 30))
def test_decoding_in_two_parts_costs_the_same(shape, first, second, n):
    whole = shape.decode(1 + first + second, n)
    assert whole == pytest.approx(shape.decode(1 + first, n) + shape.decode(1 + second, n + first), rel=1e-12)


def test_an_answer_reads_visual_and_text_and_then_writes():
    shape = DecoderShape(2, 64, 32, 128, 500)
    assert shape.answer(16, 20, 5) == shape.prefill(36) + shape.decode(5, 36)
    assert shape.decode(0, 36) == shape.decode(1, 36) == 0
    costs = [shape.answer(n, 20, 5) for n in (0, 1, 4, 16)]
    assert costs == sorted(set(costs))


def test_training_is_three_forwards_with_all_logits():
    shape = DecoderShape(2, 64, 32, 128, 500)
    rows, n = 3, 10
    forward = rows * sum(token(shape, i - 0.5) + matmul(1, 64, 500) for i in range(1, n + 1))
    assert shape.train(rows * n, n) == pytest.approx(3 * forward, rel=1e-12)


def test_grouped_query_attention_is_read_off_the_configuration():
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=77,
    )
    assert DecoderShape.from_config(config) == DecoderShape(3, 64, 16, 96, 77)
    plain = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    assert DecoderShape.from_config(plain) == DecoderShape(2, 32, 32, 128, 50)


towers = st.builds(
    TowerShape,
    layers=st.integers(4, 6),
    full_layers=st.integers(0, 4),
    hidden=st.integers(1, 8).map(lambda n: 16 * n),
    ffn=st.integers(1, 200),
    out=st.integers(1, 300),
    patch=st.integers(1, 1200),
    window=st.sampled_from([16, 64]),
    merge=st.sampled_from([1, 4]),
)


@given(towers, st.integers(1, 60))
def test_seeing_is_the_sum_over_layers_and_patches(tower, tokens):
    n, d = tokens * tower.merge, tower.hidden
    total = matmul(n, tower.patch, d)
    for layer in range(tower.layers):
        keys = n if layer < tower.full_layers else min(tower.window, n)
        for _ in range(n):
            total += 3 * matmul(1, d, d) + matmul(1, d, keys) + matmul(1, keys, d) + matmul(1, d, d)
            total += 2 * matmul(1, d, tower.ffn) + matmul(1, tower.ffn, d)  # gate and up, down
    wide = tower.merge * d
    total += matmul(tokens, wide, wide) + matmul(tokens, wide, tower.out)
    assert tower.read(tokens) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (2, 4), (4, 6)])
@pytest.mark.parametrize("depth", [2, 5])
def test_seeing_is_what_the_tower_does(rows, columns, depth):
    """All products of the stock tower, counted as it runs, on images of whole windows (2 x 2 tokens)."""
    config = Qwen2_5_VLVisionConfig(
        depth=depth,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=24,
        window_size=56,
        fullatt_block_indexes=[0, 1],
    )
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="eager")
    patches = 4 * rows * columns
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.randn(patches, 1176), grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]))
    assert TowerShape.from_config(config).read(rows * columns) == counter.get_total_flops()


@pytest.mark.parametrize(("out", "tera"), [(2048, 5.63), (3584, 5.65)])
def test_the_published_tower_takes_known_flops(out, tera):
    """Qwen2.5-VL 3B and 7B at 1,024 tokens (896 x 896 px)."""
    config = Qwen2_5_VLVisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=out,
        window_size=112,
        patch_size=14,
        spatial_merge_size=2,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    tower = TowerShape.from_config(config)
    assert tower == TowerShape(32, 4, 1280, 3420, out, 1176, 64, 4)
    assert tower.read(1024) / 1e12 == pytest.approx(tera, abs=0.006)
