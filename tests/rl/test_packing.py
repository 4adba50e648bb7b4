from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from frugalpath.models.attention import SHARED_PREFIX, check_window, decoder, implementation, share_prefix
from frugalpath.models.feature_bank import COLUMNS
from frugalpath.models.processor import token_types
from frugalpath.models.slide_config import SlideVLMConfig
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.vision_adapter import lay_out
from frugalpath.rl.packing import PackedBatch, block_mask, flex_mask, groups_of, pack, packed_mask, prefix_length
from tests.conftest import noise
from tests.rl.qwen import make_model, make_processor

IMAGE, PAD, VOCABULARY, WIDTH = 3, 0, 40, 8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def slide_vlm() -> SlideVLM:
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "qwen2",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    config = SlideVLMConfig(text_config=text, feature_dim=WIDTH, image_token_id=IMAGE, aligner_width=16)
    return SlideVLM(config)


def in_dtypes(model: Any) -> dict[torch.dtype, Any]:
    return {dtype: copy.deepcopy(model).eval().to(dtype) for dtype in TOLERANCE}


PROCESSOR = make_processor()
SLIDES = in_dtypes(slide_vlm())
QWENS = in_dtypes(make_model(PROCESSOR))
EAGER = make_model(PROCESSOR, attention="eager").eval()

# Image tokens, text tokens and the lengths of the completions of each prompt; groups differ in size.
members = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 7), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
    min_size=1,
    max_size=3,
)
# Sides of each image in tokens, instead of their number.
sides = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=3)
shown = st.lists(
    st.tuples(sides, st.integers(1, 7), st.lists(st.integers(0, 6), min_size=1, max_size=4)), min_size=1, max_size=3
)


def completions_of(spec: list, generator: torch.Generator, words: tuple[int, int]) -> tuple:
    """Ids and validity of all completions, and the rows of each prompt."""
    lengths = torch.tensor([n for _, _, own in spec for n in own])
    valid = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    ids = torch.randint(*words, valid.shape, generator=generator).masked_fill(~valid, PAD)
    rows = iter(range(len(lengths)))
    return ids, valid, [[next(rows) for _ in own] for _, _, own in spec]


def draw(spec: list, seed: int) -> tuple:
    """Prompts of slide_vlm, their visual rows, and the completions."""
    generator = torch.Generator().manual_seed(seed)
    prompts, visual = [], []
    for images, text, _ in spec:
        words = torch.randint(4, VOCABULARY, (text,), generator=generator)
        prompts.append(torch.cat([words[:-1], torch.full((images,), IMAGE), words[-1:]]))
        visual.append(torch.randn(images, WIDTH + COLUMNS, generator=generator, dtype=torch.float64))
    return prompts, visual, *completions_of(spec, generator, (4, VOCABULARY))


def packed_of(spec: list, seed: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, list, PackedBatch]:
    prompts, _, ids, valid, groups = draw(spec, seed)
    places = [torch.arange(len(p))[None] for p in prompts]
    return prompts, ids, valid, groups, pack(prompts, places, groups, ids, valid, PAD)


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, T - 1) of each next token."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def read_packed(model: Any, packed: PackedBatch, shape: tuple[int, int], **visual: Any) -> torch.Tensor:
    """Log-probabilities of the completions (rows, C), under the mask that the trainer gives to the model."""
    mask = packed_mask(packed.segment, implementation(model), model.dtype)
    out = model(input_ids=packed.input_ids, position_ids=packed.position_ids, **mask, **visual)
    return packed.scatter(log_probs(out.logits, packed.input_ids), *shape)


@pytest.mark.slow
@given(members, st.integers(0, 99), st.sampled_from(list(TOLERANCE)), st.sampled_from(["sdpa", SHARED_PREFIX]))
@torch.no_grad()
def test_packed_rows_give_the_log_probabilities_of_separate_rows(spec, seed, dtype, attention):
    model = SLIDES[dtype]
    decoder(model).set_attn_implementation(attention)
    prompts, visual, ids, valid, groups = draw(spec, seed)
    packed = pack(prompts, [torch.arange(len(p))[None] for p in prompts], groups, ids, valid, PAD)
    found = read_packed(model, packed, ids.shape, pixel_values=torch.cat(visual).to(dtype))
    assert (found[~valid] == 0).all()
    for prompt, features, rows in zip(prompts, visual, groups, strict=True):
        for row in rows:
            alone = torch.cat([prompt, ids[row, valid[row]]])[None]
            expected = log_probs(model(input_ids=alone, pixel_values=features.to(dtype)).logits, alone)
            assert torch.allclose(found[row, valid[row]], expected[0, len(prompt) - 1 :], 0, TOLERANCE[dtype])


def draw_shown(spec: list, seed: int) -> tuple:
    """Prompts of Qwen2.5-VL as it reads them, and the completions."""
    generator = torch.Generator().manual_seed(seed)
    sight = PROCESSOR.sight
    start, end = PROCESSOR.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    prompts = []
    for i, (sizes, text, _) in enumerate(spec):
        views = [sight.view(noise(28 * w, 28 * h, 10 * i + k)) for k, (h, w) in enumerate(sizes)]
        words = torch.randint(10, 200, (text,), generator=generator).tolist()
        images = [t for v in views for t in (start, *[sight.image_token_id] * len(v), end)]
        prompts.append(lay_out(sight, [*words[:-1], *images, words[-1]], views))
    return prompts, *completions_of(spec, generator, (10, 200))


def pixels(views: list, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    fields = PROCESSOR.sight.fields(views)
    return {**fields, "pixel_values": fields["pixel_values"].to(dtype)} if fields else {}


@pytest.mark.slow
@given(shown, st.integers(0, 99), st.sampled_from(list(TOLERANCE)), st.sampled_from(["sdpa", SHARED_PREFIX]))
@torch.no_grad()
def test_packed_rows_of_images_give_the_log_probabilities_of_separate_rows(spec, seed, dtype, attention):
    """Separate rows are read by transformers alone, which places their tokens itself."""
    model = QWENS[dtype]
    decoder(model).set_attn_implementation(attention)
    prompts, ids, valid, groups = draw_shown(spec, seed)
    packed = pack([p.ids for p in prompts], [p.positions for p in prompts], groups, ids, valid, PAD)
    assert packed.position_ids.shape == (3, *packed.input_ids.shape)
    found = read_packed(model, packed, ids.shape, **pixels([v for p in prompts for v in p.views], dtype))
    for prompt, rows in zip(prompts, groups, strict=True):
        for row in rows:
            alone = torch.cat([prompt.ids, ids[row, valid[row]]])[None]
            typed = token_types(alone, PROCESSOR.image_token_id)
            logits = model(input_ids=alone, mm_token_type_ids=typed, **pixels(prompt.views, dtype)).logits
            expected = log_probs(logits, alone)[0, len(prompt) - 1 :]
            assert torch.allclose(found[row, valid[row]], expected, 0, TOLERANCE[dtype])


MIXED = [([(2, 3)], 3, [4, 2]), ([], 5, [3]), ([(1, 2), (3, 1)], 2, [1, 5, 2])]


@torch.no_grad()
def test_images_and_the_completion_so_far_are_heard_and_other_completions_are_not():
    """Otherwise the comparisons above would say little."""
    model = QWENS[torch.float64]
    prompts, ids, valid, groups = draw_shown(MIXED, 0)
    fields = pixels([v for p in prompts for v in p.views], torch.float64)
    packed = pack([p.ids for p in prompts], [p.positions for p in prompts], groups, ids, valid, PAD)
    found = read_packed(model, packed, ids.shape, **fields)
    blank = read_packed(model, packed, ids.shape, **{**fields, "pixel_values": fields["pixel_values"] * 0})
    told = [bool((blank[rows] - found[rows]).abs().max() > 0.1) for rows in groups]
    assert told == [True, False, True]
    other = ids.clone()
    other[0, 0] += 1
    changed = read_packed(
        model,
        pack([p.ids for p in prompts], [p.positions for p in prompts], groups, other, valid, PAD),
        ids.shape,
        **fields,
    )
    assert (changed[0, :4] - found[0, :4]).abs().min() > 1e-3
    assert torch.allclose(changed[1:], found[1:], 0, 1e-9)


@torch.no_grad()
def test_eager_attention_gives_the_same():
    prompts, ids, valid, groups = draw_shown(MIXED, 0)
    packed = pack([p.ids for p in prompts], [p.positions for p in prompts], groups, ids, valid, PAD)
    fields = pixels([v for p in prompts for v in p.views], torch.float32)
    stock, eager = (read_packed(m, packed, ids.shape, **fields) for m in (QWENS[torch.float32], EAGER))
    assert (eager - stock).abs().max() < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_gives_the_same():
    """Not compiled, which would take 20 s."""
    prompts, ids, valid, groups = draw_shown(MIXED, 0)
    packed = pack([p.ids for p in prompts], [p.positions for p in prompts], groups, ids, valid, PAD)
    fields = pixels([v for p in prompts for v in p.views], torch.float32)
    expected = read_packed(QWENS[torch.float32], packed, ids.shape, **fields)
    flex = make_model(PROCESSOR).eval()
    share_prefix(flex, flex=True)
    with torch.compiler.set_stance("force_eager"):
        found = read_packed(flex, packed, ids.shape, **fields)
    assert (found - expected).abs().max() < 1e-5


def test_attention_that_cannot_keep_completions_apart_is_refused():
    model = make_model(PROCESSOR, text_only=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"'flash_attention_2' .*load the model with 'sdpa', .*shared_prefix to false"
    ):
        share_prefix(model)


def test_rows_that_some_layer_does_not_see_whole_are_refused():
    model = make_model(PROCESSOR, text_only=True)
    check_window(model, 10**6)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], 8
    with pytest.raises(
        ValueError, match=r"qwen2 has layers of sliding_attention, .*set shared_prefix and prefill_once"
    ):
        check_window(model, 9)


@given(members, st.integers(0, 99))
def test_a_row_holds_its_prompt_once(spec, seed):
    prompts, _, valid, groups, packed = packed_of(spec, seed)
    lengths = [len(p) - 1 + len(g) + int(valid[g].sum()) for p, g in zip(prompts, groups, strict=True)]
    assert packed.input_ids.shape == packed.segment.shape == (len(prompts), max(lengths))
    for i, (prompt, rows, length) in enumerate(zip(prompts, groups, lengths, strict=True)):
        row, n = packed.input_ids[i], len(prompt) - 1
        assert (row == IMAGE).sum() == (prompt == IMAGE).sum()
        assert torch.equal(row[:n], prompt[:-1]) and (packed.segment[i, :n] == 0).all()
        assert (row[length:] == PAD).all() and (packed.source[i, length:] == -1).all()
        assert (packed.segment[i, length:] == -1).all() and (packed.segment[i, :length] >= 0).all()
        for k, member in enumerate(rows, 1):
            # The last token of the prompt and the completion, at the positions that they have in a row of their own.
            own = packed.segment[i] == k
            assert row[own][0] == prompt[-1] and own.sum() == 1 + valid[member].sum()
            assert packed.position_ids[i, own].tolist() == list(range(n, n + int(own.sum())))
    shown = packed.labels != -100
    assert torch.equal(shown, packed.source >= 0)
    assert int(shown.sum()) == int(valid.sum())
    assert torch.equal(packed.labels[shown], packed.input_ids[shown])
    assert not shown[:, 0].any(), "every completion token has a token before it"


def test_completions_go_on_from_the_largest_position_of_an_image():
    prompt = torch.tensor([5, 3, 3, 3, 3, 3, 3, 6])
    place = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]])
    ids, valid = torch.tensor([[7, 8], [9, 0]]), torch.tensor([[True, True], [True, False]])
    packed = pack([prompt], [place], [[0, 1]], ids, valid, PAD)
    assert packed.input_ids.tolist() == [[5, 3, 3, 3, 3, 3, 3, 6, 7, 8, 6, 9]]
    assert packed.position_ids[:, 0, :7].tolist() == place[:, :7].tolist()
    assert packed.position_ids[:, 0, 7:].tolist() == [[4, 5, 6, 4, 5]] * 3


@given(members, st.integers(0, 99))
def test_scatter_puts_every_value_in_its_place(spec, seed):
    _, ids, valid, _, packed = packed_of(spec, seed)
    back = packed.scatter(packed.input_ids[:, 1:].double() + 100, *ids.shape)
    assert torch.equal(back, (ids + 100).double() * valid)


def test_scatter_lets_gradients_through():
    _, ids, _, _, packed = packed_of([(0, 3, [2, 1])], 0)
    values = torch.ones(1, packed.input_ids.shape[1] - 1, requires_grad=True)
    packed.scatter(values, *ids.shape).sum().backward()
    assert torch.equal(values.grad, (packed.source[:, 1:] >= 0).float())


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 5))
def test_a_suffix_sees_the_prefix_and_itself_only(suffixes, prefix):
    """`suffixes`: lengths of the suffixes of each row."""
    rows = [torch.tensor([0] * prefix + [k + 1 for k, n in enumerate(row) for _ in range(n)]) for row in suffixes]
    segment = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    mask = block_mask(segment)
    count, length = segment.shape
    assert mask.shape == (count, 1, length, length) and mask.dtype == torch.bool
    for b in range(count):
        for q in range(length):
            own = int(segment[b, q])
            expected = [k for k in range(q + 1) if own >= 0 and int(segment[b, k]) in (0, own)] or [q]
            assert mask[b, 0, q].nonzero()[:, 0].tolist() == expected
    n = prefix_length(segment)
    assert n == prefix, "no row is longer than its prefix here"
    assert torch.equal(block_mask(segment, n), mask[:, :, n:])
    flex = flex_mask(segment)
    b, q, k = torch.meshgrid(torch.arange(count), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(flex.mask_mod(b, torch.zeros_like(b), q, k), mask[:, 0])
    assert flex.shape == (count, 1, length, length)


@given(st.lists(st.integers(0, 5), max_size=20))
def test_groups_hold_the_rows_of_each_prompt_in_order(index):
    groups = groups_of(index)
    assert sorted(row for g in groups for row in g) == list(range(len(index)))
    assert all(len({index[row] for row in g}) == 1 and g == sorted(g) for g in groups)
    firsts = [g[0] for g in groups]
    assert firsts == sorted(firsts) and len({index[row] for row in firsts}) == len(groups)
