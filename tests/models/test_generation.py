from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import GenerationConfig

from frugalpath.models.attention import decoder, implementation
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.generation import by_length, generate, generate_sure, to_device
from frugalpath.models.vision_adapter import lay_out
from tests.conftest import needs_features

LENGTH = 8


def greedy(performer, ends: int | list[int] | None = None) -> GenerationConfig:
    tokenizer = performer.processor.tokenizer
    return GenerationConfig(
        max_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
    )


@torch.no_grad()
def stock(performer, prompts, messages, copies, config) -> list[list[int]]:
    """Transformers' own generation: every copy is a row with its own pixels, prefilled as a whole."""
    rows = [i for i, n in enumerate(copies) for _ in range(n)]
    texts = performer.processor.apply_chat_template([messages[i] for i in rows], add_generation_prompt=True)
    images = [list(prompts[i].views) for i in rows]
    images = images if any(images) else None
    inputs = performer.processor(images=images, text=texts, padding=True, return_tensors="pt")
    out = performer.model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    if hasattr(performer.model.model, "rope_deltas"):
        performer.model.model.rope_deltas = None
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return [row[: next((k + 1 for k, t in enumerate(row) if t in ends), LENGTH)] for row in out]


def both(performer, cases, budgets, copies, ends=None) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [performer.prompt(c, b) for c, b in zip(cases, budgets, strict=True)]
    messages = [performer.messages(c, p.views) for c, p in zip(cases, prompts, strict=True)]
    config = greedy(performer, ends)
    ours = generate(performer.model, performer.processor.sight, prompts, copies, config)
    return ours, stock(performer, prompts, messages, copies, config)


def test_completions_of_stored_features_are_those_of_repeated_rows(performer, cases):
    ours, expected = both(performer, cases[:5], (16, 0, 4, 36, 1), (2, 1, 3, 1, 2))
    assert ours == expected
    assert len(ours) == 9 and ours[0] == ours[1] and len({tuple(row) for row in ours}) > 3


@needs_features
@pytest.mark.parametrize("once", [True, False])
def test_completions_of_images_are_those_of_repeated_rows(qwen, image_cases, once):
    qwen.processor.sight.once = once
    budgets = (16, 10, 4, 12, 3, 12)
    ours, expected = both(qwen, image_cases, budgets, (2, 1, 3, 1, 2, 4))
    assert ours == expected
    assert len(ours) == 13 and len({tuple(row) for row in ours}) >= 4
    seen = [v for c, b in zip(image_cases, budgets, strict=True) for v in qwen.see(c, b)]
    assert len({len(v) for v in seen}) > 2
    assert all((v.features is not None) == once for v in seen)


def test_what_is_shown_reaches_the_completion(qwen, image_cases):
    """Otherwise the comparisons above would say nothing about the images."""
    (shown, _), (blank, _) = both(qwen, image_cases[:1], [16], [1]), both(qwen, image_cases[:1], [0], [1])
    assert shown != blank


def test_prompts_without_images_need_no_tower(qwen, image_cases):
    ours, expected = both(qwen, image_cases[:3], (0, 0, 9), (1, 2, 1))
    assert ours == expected
    assert qwen.processor.sight.seen == 0


def test_any_end_token_ends_a_completion(qwen, image_cases):
    free, _ = both(qwen, image_cases[:4], (16, 8, 4, 12), (1, 1, 1, 1))
    assert {len(row) for row in free} == {LENGTH}
    ends = [free[0][2], free[3][1]]
    ours, expected = both(qwen, image_cases[:4], (16, 8, 4, 12), (1, 1, 1, 1), ends)
    assert ours == expected
    assert ours == [row[: next((k + 1 for k, t in enumerate(row) if t in ends), LENGTH)] for row in free]
    assert len(ours[0]) <= 3 and len(ours[3]) <= 2 and ours[3][-1] in ends


def test_a_prompt_is_read_once_and_ended_completions_stop(qwen, image_cases):
    prompt = qwen.prompt(image_cases[0], 16)
    (free,) = generate(qwen.model, qwen.processor.sight, [prompt], [1], greedy(qwen))
    shapes = []
    decoder(qwen.model).register_forward_hook(lambda module, inputs, out: shapes.append(out[0].shape[:2]))
    generate(qwen.model, qwen.processor.sight, [prompt], [3], greedy(qwen))
    assert shapes == [(1, len(prompt)), *[(1, 3)] * (LENGTH - 1)]
    shapes.clear()
    written = generate(qwen.model, qwen.processor.sight, [prompt], [3], greedy(qwen, free[2]))
    assert written == [free[: free.index(free[2]) + 1]] * 3
    assert shapes == [(1, len(prompt)), *[(1, 3)] * free.index(free[2])]


def test_nothing_of_one_call_is_left_for_the_next(qwen, image_cases):
    sight = qwen.processor.sight
    first = qwen.prompt(image_cases[0], 16)
    alone = generate(qwen.model, sight, [first], [1], greedy(qwen))
    generate(qwen.model, sight, [qwen.prompt(image_cases[3], 12)], [3], greedy(qwen))
    assert generate(qwen.model, sight, [first], [1], greedy(qwen)) == alone
    # Stock forwards would go on from positions that are left there.
    assert qwen.model.model.rope_deltas is None
    config = greedy(qwen)
    before = config.to_dict()
    generate(qwen.model, sight, [first], [1], config)
    assert config.to_dict() == before


def test_a_prompt_that_is_not_completed_or_has_one_token(qwen, image_cases):
    sight = qwen.processor.sight
    prompts = [qwen.prompt(c, 8) for c in image_cases[:3]]
    assert generate(qwen.model, sight, [], [], greedy(qwen)) == []
    alone = [generate(qwen.model, sight, [p], [1], greedy(qwen))[0] for p in prompts]
    assert generate(qwen.model, sight, prompts, [2, 0, 1], greedy(qwen)) == [alone[0], alone[0], alone[2]]
    single = lay_out(sight, [20], [])
    (written,) = generate(qwen.model, sight, [single], [1], greedy(qwen))
    expected = qwen.model.generate(input_ids=torch.tensor([[20]]), generation_config=greedy(qwen))[0, 1:].tolist()
    assert written == expected


@pytest.mark.slow
@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.5}, {"min_p": 0.05, "repetition_penalty": 1.5}]
)
def test_samples_of_one_prompt_are_those_of_the_stock_model(qwen, image_cases, changes, copies):
    config = greedy(qwen)
    config.update(**{"do_sample": True, "top_k": 0, **changes})
    case = image_cases[0]
    prompt = qwen.prompt(case, 16)
    outs = []
    for write in (
        lambda: generate(qwen.model, qwen.processor.sight, [prompt], [copies], config),
        lambda: stock(qwen, [prompt], [qwen.messages(case, prompt.views)], [copies], config),
    ):
        torch.manual_seed(5)
        outs.append(write())
    assert outs[0] == outs[1]
    assert len({tuple(row) for row in outs[0]}) == copies, "copies are drawn apart"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": []},  # what is written without
        {"min_new_tokens": 5},
        {"max_new_tokens": 1},
    ],
)
@pytest.mark.parametrize("where", ["call", "model"])
def test_logits_are_processed_as_by_the_stock_model(qwen, image_cases, changes, where):
    cases, budgets = image_cases[:4], (16, 8, 4, 12)
    plain, _ = both(qwen, cases, budgets, (2, 1, 1, 1))
    ends = [plain[0][1], plain[2][2]]
    plain, _ = both(qwen, cases, budgets, (2, 1, 1, 1), ends)
    prompts = [qwen.prompt(c, b) for c, b in zip(cases, budgets, strict=True)]
    messages = [qwen.messages(c, p.views) for c, p in zip(cases, prompts, strict=True)]
    config = greedy(qwen, ends)
    if "suppress_tokens" in changes:
        changes = {"suppress_tokens": sorted({row[0] for row in plain})}
    if where == "call" or "max_new_tokens" in changes:
        config.update(**changes)
    else:  # what the call leaves open is read from the model's own configuration
        qwen.model.generation_config.update(**changes)
    ours = generate(qwen.model, qwen.processor.sight, prompts, (2, 1, 1, 1), config)
    assert ours == stock(qwen, prompts, messages, (2, 1, 1, 1), config)
    assert ours != plain


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen", "eager"), ("qwen", "shared_prefix"), ("performer", "eager"), ("performer", "flex_attention")],
)
def test_every_attention_gives_the_same_completions(request, cases, image_cases, family, name):
    made = request.getfixturevalue(family)
    shown = zip((image_cases if family == "qwen" else cases)[:4], (16, 9, 4, 16), strict=True)
    prompts = [made.prompt(c, b) for c, b in shown]
    assert implementation(made.model) == "sdpa"
    expected = generate(made.model, made.processor.sight, prompts, (2, 1, 3, 1), greedy(made))
    decoder(made.model).set_attn_implementation(name)
    assert generate(made.model, made.processor.sight, prompts, (2, 1, 3, 1), greedy(made)) == expected
    assert implementation(made.model) == name, "it is left as it was"


def test_adapters_write_as_the_model_they_are_merged_into(qwen, image_cases):
    prompts = [qwen.prompt(c, 8) for c in image_cases[:3]]
    plain = generate(qwen.model, qwen.processor.sight, prompts, (2, 1, 1), greedy(qwen))
    adapted = get_peft_model(
        qwen.model,
        lora_config(
            PerformerConfig(family="qwen_vl", lora={"r": 4, "lora_alpha": 16, "init_lora_weights": False}), qwen.model
        ),
    ).eval()
    written = generate(adapted, qwen.processor.sight, prompts, (2, 1, 1), greedy(qwen))
    assert written != plain
    assert generate(adapted.merge_and_unload(), qwen.processor.sight, prompts, (2, 1, 1), greedy(qwen)) == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2}, "num_beams is not done"),
        ({"stop_strings": ["a"], "max_time": 1.0}, "stop_strings, max_time is not done"),
        ({"guidance_scale": 2.0}, "guidance_scale is not done"),
        ({"max_new_tokens": None}, "max_new_tokens is missing"),
    ],
)
def test_what_is_not_made_here_is_refused(qwen, image_cases, changes, message):
    config = greedy(qwen)
    config.update(**changes)
    with pytest.raises(ValueError, match=f"{message}.*set prefill_once to false"):
        generate(qwen.model, qwen.processor.sight, [qwen.prompt(image_cases[0], 4)], [1], config)


lengths_lists = st.lists(st.integers(1, 60), max_size=40)


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


def test_tensors_go_to_a_device_wherever_they_are_nested():
    meta = torch.device("meta")
    inputs = {"a": torch.ones(2), "b": [torch.ones(1), {"c": (torch.ones(3), "text")}], "d": None}
    moved = to_device(inputs, meta)
    assert [moved["a"].device, moved["b"][0].device, moved["b"][1]["c"][0].device] == [meta] * 3
    assert moved["b"][1]["c"][1] == "text" and moved["d"] is None
    assert inputs["a"].device.type == "cpu"


def test_a_completion_comes_with_the_models_own_log_probability(performer, cases):
    config = greedy(performer)
    config.suppress_tokens = [5]  # a ban changes what is chosen, not how likely the model held it
    prompts = [performer.prompt(c, b) for c, b in zip(cases[:3], (16, 0, 4), strict=True)]
    sight = performer.processor.sight
    written = generate_sure(performer.model, sight, prompts, [1, 2, 1], config)
    rows = [prompts[i] for i in (0, 1, 1, 2)]
    for prompt, (ids, logp) in zip(rows, written, strict=True):
        whole = lay_out(sight, [*prompt.ids.tolist(), *ids], prompt.views)
        with torch.no_grad():
            out = performer.model(input_ids=whole.ids[None], **sight.inputs(performer.model, [prompt.views]))
        steps = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = steps.gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert logp == pytest.approx(expected, abs=1e-4)
    assert [ids for ids, _ in written] == generate(performer.model, sight, prompts, [1, 2, 1], config)
