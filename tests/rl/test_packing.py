from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from models.generation import by_length
from models.slide_vlm import SlideVLM, SlideVLMConfig
from models.visual import PLACE
from rl.packing import block_mask, pack

IMAGE, PAD, VOCABULARY, WIDTH = 3, 0, 40, 8


def model(dtype: torch.dtype) -> SlideVLM:
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
    return SlideVLM(config).eval().to(dtype)


MODELS = {dtype: model(dtype) for dtype in (torch.float32, torch.float64)}

groups = st.integers(1, 4).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(
            st.tuples(
                st.integers(0, 5),  # image tokens
                st.integers(1, 7),  # text tokens
                st.lists(st.integers(1, 6), min_size=size, max_size=size),  # lengths of the completions
            ),
            min_size=1,
            max_size=3,
        ),
    )
)


def draw(spec, seed: int):
    """Prompts, completions (b * G, C), their validity and the visual rows of each prompt."""
    _, members = spec
    generator = torch.Generator().manual_seed(seed)
    width = max(n for _, _, lengths in members for n in lengths)
    prompts, visual = [], []
    for images, text, _ in members:
        words = torch.randint(4, VOCABULARY, (text,), generator=generator)
        prompts.append(torch.cat([words[:-1], torch.full((images,), IMAGE), words[-1:]]))
        visual.append(torch.randn(images, WIDTH + PLACE, generator=generator, dtype=torch.float64))
    lengths = torch.tensor([n for _, _, row in members for n in row])
    valid = torch.arange(width) < lengths[:, None]
    completions = torch.randint(4, VOCABULARY, (len(lengths), width), generator=generator)
    return prompts, completions.masked_fill(~valid, PAD), valid, visual


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (B, T - 1) of each next token."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@settings(max_examples=12, deadline=None)
@given(groups, st.integers(0, 99), st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-9)]))
def test_packed_rows_give_the_log_probabilities_of_separate_rows(spec, seed, precision):
    dtype, tolerance = precision
    network, size = MODELS[dtype], spec[0]
    prompts, completions, valid, visual = draw(spec, seed)
    packed = pack(prompts, completions, valid, PAD)
    with torch.no_grad():
        out = network(
            input_ids=packed.input_ids,
            attention_mask=packed.mask,
            position_ids=packed.position_ids,
            pixel_values=torch.cat(visual).to(dtype),
        )
        found = packed.scatter(log_probs(out.logits, packed.input_ids), *completions.shape)
        for i, (row, kept) in enumerate(zip(completions, valid, strict=True)):
            prompt = prompts[i // size]
            ids = torch.cat([prompt, row[kept]])[None]
            logits = network(input_ids=ids, pixel_values=visual[i // size].to(dtype)).logits
            expected = log_probs(logits, ids)[0, len(prompt) - 1 :]
            assert (found[i, kept] - expected).abs().max() < tolerance
    assert (found[~valid] == 0).all()


@settings(max_examples=50, deadline=None)
@given(groups, st.integers(0, 99))
def test_a_row_holds_its_prompt_once(spec, seed):
    size = spec[0]
    prompts, completions, valid, _ = draw(spec, seed)
    packed = pack(prompts, completions, valid, PAD)
    lengths = [len(p) - 1 + size + int(valid[g * size : (g + 1) * size].sum()) for g, p in enumerate(prompts)]
    assert packed.input_ids.shape == (len(prompts), max(lengths))
    for g, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        row = packed.input_ids[g]
        assert (row == IMAGE).sum() == (prompt == IMAGE).sum()
        assert torch.equal(row[: len(prompt) - 1], prompt[:-1])
        assert (row[length:] == PAD).all() and (packed.source[g, length:] == -1).all()
    shown = packed.labels != -100
    assert torch.equal(shown, packed.source >= 0)
    assert int(shown.sum()) == int(valid.sum())
    assert torch.equal(packed.labels[shown], packed.input_ids[shown])
    assert not shown[:, 0].any(), "every completion token has a token before it"


@settings(max_examples=50, deadline=None)
@given(groups, st.integers(0, 99))
def test_scatter_puts_every_value_in_its_place(spec, seed):
    prompts, completions, valid, _ = draw(spec, seed)
    packed = pack(prompts, completions, valid, PAD)
    back = packed.scatter(packed.input_ids[:, 1:].double() + 100, *completions.shape)
    assert torch.equal(back, (completions + 100).double() * valid)


def test_scatter_lets_gradients_through():
    prompts, completions, valid, _ = draw((2, [(0, 3, [2, 1])]), 0)
    packed = pack(prompts, completions, valid, PAD)
    values = torch.ones(1, packed.input_ids.shape[1] - 1, requires_grad=True)
    packed.scatter(values, *completions.shape).sum().backward()
    assert torch.equal(values.grad, (packed.source[:, 1:] >= 0).float())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3), st.integers(0, 5))
def test_a_suffix_sees_the_prefix_and_itself_only(members, prefix):
    """`members`: lengths of the suffixes of each row."""
    rows = [torch.tensor([0] * prefix + [k + 1 for k, n in enumerate(row) for _ in range(n)]) for row in members]
    segment = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    mask = block_mask(segment)
    count, length = segment.shape
    assert mask.shape == (count, 1, length, length) and mask.dtype == torch.bool
    for b in range(count):
        for q in range(length):
            own = int(segment[b, q])
            expected = [k for k in range(q + 1) if own >= 0 and int(segment[b, k]) in (0, own)] or [q]
            assert mask[b, 0, q].nonzero()[:, 0].tolist() == expected


lengths_lists = st.lists(st.integers(1, 60), max_size=40)


@settings(max_examples=100, deadline=None)
@given(lengths_lists, st.sampled_from([0.0, 0.25, 0.6]), st.one_of(st.none(), st.integers(1, 6)))
def test_batches_of_like_length_cover_every_index_once(lengths, waste, cap):
    batches = list(by_length(lengths, waste, cap))
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert batch and (cap is None or len(batch) <= cap)
        real, longest = sum(lengths[i] for i in batch), max(lengths[i] for i in batch)
        assert real >= (1 - waste) * longest * len(batch) - 1e-9


def test_rows_of_one_length_share_a_batch():
    assert [len(b) for b in by_length([7] * 10)] == [10]
    assert [len(b) for b in by_length([7] * 10, cap=4)] == [4, 4, 2]


@pytest.mark.parametrize("waste", [0.0, 0.25])
def test_a_long_row_stands_alone(waste):
    assert list(by_length([100, 3, 3, 3], waste)) == [[0], [1, 2, 3]]
