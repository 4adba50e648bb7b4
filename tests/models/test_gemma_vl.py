from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from frugalpath.errors import InputError
from frugalpath.models.attention import SHARED_PREFIX, decoder
from frugalpath.models.build import PerformerConfig, load_performer, lora_config, make_vision_adapter
from frugalpath.models.feature_cache import FeatureCache
from frugalpath.models.gemma_vl import MARKS, GemmaPerformer, GemmaVisionAdapter, gemma_backbone, vision_parts
from frugalpath.models.generation import generate
from frugalpath.rl.packing import block_mask, pack, packed_mask, runs_of
from frugalpath.rl.trainer import GroupTrainer
from tests.conftest import needs_features, noise

BUDGETS = (64, 9, 0, 32, 4, 64)


@pytest.fixture(scope="module")
def make_gemma(make_performer):
    """Builds a small Gemma 3 whose last layer of six sees the whole row, in eval mode."""

    def make(**changes) -> GemmaPerformer:
        made = make_performer(family="gemma_vl", layers=6, ffn=48, **changes)
        # Louder images, which the completions hang on.
        gemma_backbone(made.model).multi_modal_projector.mm_input_projection_weight.data.mul_(4)
        made.model.eval()
        return made

    return make


@pytest.fixture
def gemma(make_gemma) -> GemmaPerformer:
    return make_gemma()


def stock_inputs(gemma, case) -> tuple[torch.Tensor, dict]:
    """Token ids of a prompt at the full budget, and what the stock forward gets beside them."""
    ids = gemma.prompt(case, 64 * len(case.images)).ids[None]
    if not case.images:
        return ids, {}
    images = [Image.open(path).convert("RGB") for path in case.images]
    pixels = gemma.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return ids, {"pixel_values": pixels, "token_type_ids": gemma.processor.sight.typed(ids)["token_type_ids"]}


# The view.


@pytest.mark.parametrize(("budget", "tokens"), [(1, 1), (3, 1), (4, 4), (20, 16), (64, 64), (9999, 64)])
def test_a_view_is_the_largest_square_within_the_budget(gemma, image_cases, budget, tokens):
    (view,) = gemma.see(image_cases[1], budget)
    assert len(view) == view.tokens == tokens
    assert gemma.native(image_cases[1].images[0]) == 64


def test_tokens_are_means_of_regions_of_the_grid(gemma, image_cases):
    sight, base = gemma.processor.sight, gemma_backbone(gemma.model)
    path = image_cases[0].images[0]
    views = [sight.view_at(path, budget) for budget in (64, 16, 9, 1)]
    sight.see(base, views)
    grid = views[0].features.view(8, 8, -1)
    stock = base.get_image_features(stock_inputs(gemma, image_cases[0])[1]["pixel_values"]).pooler_output[0]
    assert torch.allclose(views[0].features, stock, atol=1e-6)
    assert torch.allclose(views[1].features.view(4, 4, -1)[1, 2], grid[2:4, 4:6].mean((0, 1)), atol=1e-6)
    assert torch.allclose(views[2].features.view(3, 3, -1)[0, 2], grid[:3, 5:].mean((0, 1)), atol=1e-6)
    assert torch.allclose(views[3].features[0], grid.mean((0, 1)), atol=1e-6)


@needs_features
def test_an_image_is_seen_once_whatever_the_budgets(gemma, image_cases, tmp_path):
    sight = gemma.processor.sight
    seen = sum(len(c.images) for c in image_cases)
    before = gemma.answer(image_cases, BUDGETS, max_new_tokens=4)
    gemma.answer(image_cases, (1, 4, 16, 64, 64, 16), max_new_tokens=1)
    assert sight.seen == seen
    cache = FeatureCache(tmp_path)
    sight.configure(gemma.model, False, None, sight.autocast)
    assert gemma.answer(image_cases, BUDGETS, max_new_tokens=4)[0].text == before[0].text
    assert sight.seen == 2 * seen, "in every forward where that is asked for"
    sight.configure(gemma.model, True, cache, sight.autocast)
    for _ in range(2):
        gemma._view.cache_clear()
        sight.held.clear()
        after = gemma.answer(image_cases, BUDGETS, max_new_tokens=4)
        assert [a.text for a in after] == [a.text for a in before]
        assert sight.seen == 3 * seen, "the second time from disk"


@needs_features
def test_a_copied_tower_sees_for_a_model_whose_own_holds_nothing(gemma, image_cases):
    """As on a process that has none of its weights."""
    sight, path, base = gemma.processor.sight, image_cases[0].images[0], gemma_backbone(gemma.model)
    view, copied = (sight.view_at(path, 9) for _ in range(2))
    sight.inputs(gemma.model, [[view]])
    sight.keep_tower(gemma.model, torch.device("cpu"))
    sight.configure(gemma.model, True, None, sight.autocast)
    for part in vision_parts(base):
        for parameter in part.parameters():
            parameter.data = torch.empty(0)
    sight.inputs(gemma.model, [[copied]])
    assert sight.seen == 2 and torch.allclose(copied.features, view.features)


# The text.


def test_images_stand_in_the_text_as_in_the_stock_processor(gemma, image_cases):
    prompt = gemma.prompt(image_cases[3], 8)
    text = gemma.processor.tokenizer.decode(prompt.ids)
    start, soft, end = MARKS
    assert text.count(f"\n\n{start}{soft * 4}{end}\n\n") == 2 == len(prompt.views)
    assert prompt.visual == 8 and torch.equal(prompt.positions, torch.arange(len(prompt.ids))[None])


# Equality with the stock model.


@needs_features
@torch.no_grad()
def test_answers_are_those_of_the_stock_model(gemma, image_cases):
    ours = gemma.answer(image_cases, [64 * len(c.images) for c in image_cases], max_new_tokens=6)
    assert len({a.text for a in ours}) > 2
    for case, answer in zip(image_cases, ours, strict=True):
        ids, seen = stock_inputs(gemma, case)
        config = gemma.greedy(6)
        out = gemma.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **seen, generation_config=config
        )
        assert gemma.processor.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer.text


@needs_features
def test_completions_of_a_prompt_may_be_more_than_the_window(make_gemma, image_cases):
    made = make_gemma()
    prompts = [made.prompt(c, 16) for c in image_cases[:3]]
    config = made.greedy(12)
    config.update(min_new_tokens=12)
    free = generate(made.model, made.processor.sight, prompts, (8, 8, 8), config)
    text = made.model.config.get_text_config()
    text.sliding_window = max(map(len, prompts)) + 12
    assert text.sliding_window < len(prompts[0]) + 8 * 12
    assert generate(made.model, made.processor.sight, prompts, (8, 8, 8), config) == free
    assert free[0] == free[7], "greedy ones are all alike"


@pytest.mark.slow
@needs_features
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", SHARED_PREFIX])
def test_packed_rows_give_the_log_probabilities_of_the_stock_forward(gemma, image_cases, attention):
    model, sight = gemma.model, gemma.processor.sight
    completions = torch.randint(10, 200, (18, 5))
    valid = torch.arange(5) < torch.tensor([5, 2, 3] * 6)[:, None]
    groups = [list(range(3 * i, 3 * i + 3)) for i in range(6)]
    prompts = [gemma.prompt(c, 64 * len(c.images)) for c in image_cases]
    packed = pack([p.ids for p in prompts], [p.positions for p in prompts], groups, completions, valid, 0)
    decoder(model).set_attn_implementation(attention)
    trainer = SimpleNamespace(sight=sight, _attention=attention, _dtype=lambda: model.dtype)
    causal = packed_mask(packed.segment, attention, model.dtype, None)
    found = {}
    for name, mask in (("whole", GroupTrainer._mask(trainer, packed)), ("causal", causal)):
        out = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            **mask,
            **sight.inputs(model, [p.views for p in prompts]),
        )
        logps = out.logits[:, :-1].log_softmax(-1).gather(-1, packed.input_ids[:, 1:, None])[..., 0]
        found[name] = packed.scatter(logps, *completions.shape)
    decoder(model).set_attn_implementation("sdpa")
    differ = []
    for case, prompt, rows in zip(image_cases, prompts, groups, strict=True):
        ids, seen = stock_inputs(gemma, case)
        for row in rows:
            alone = torch.cat([ids[0], completions[row, valid[row]]])[None]
            if seen:
                seen["token_type_ids"] = sight.typed(alone)["token_type_ids"]
            logps = model(input_ids=alone, **seen).logits[0, :-1].log_softmax(-1)
            expected = logps.gather(-1, alone[0, 1:, None])[len(prompt) - 1 :, 0]
            assert torch.allclose(found["whole"][row, valid[row]], expected, atol=2e-5)
            differ.append(bool((found["causal"][row, valid[row]] - expected).abs().max() > 1e-3))
    assert any(differ), "what image tokens see of each other matters"


def test_runs_are_seen_whole_and_nothing_else():
    ids = torch.tensor([[7, 7, 1, 7, 2, 3, 4, 0]])
    runs = runs_of(ids, 7)
    assert runs.tolist() == [[0, 0, -1, 1, -1, -1, -1, -1]]
    segment = torch.tensor([[0, 0, 0, 0, 0, 1, 2, -1]])
    more = block_mask(segment, runs=runs) & ~block_mask(segment)
    assert more.nonzero().tolist() == [[0, 0, 0, 1]]


# Parts, saving.


def test_only_the_language_model_is_trained(gemma):
    trained = {n for n, p in gemma.model.named_parameters() if p.requires_grad}
    assert trained and all("language_model" in n or "lm_head" in n for n in trained)
    adapted = get_peft_model(gemma.model, lora_config(PerformerConfig(family="gemma_vl", lora={"r": 2}), gemma.model))
    assert gemma_backbone(adapted) is gemma_backbone(gemma.model)
    assert all(".language_model." in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_what_it_cannot_do_is_refused(gemma, make_qwen, image_cases):
    with pytest.raises(InputError, match="freeze_vision: gemma_vl"):
        PerformerConfig(family="gemma_vl", freeze_vision=False)
    sight = gemma.processor.sight
    with pytest.raises(InputError, match="leave shared_prefix and prefill_once on"):
        sight.fields(gemma.see(image_cases[0], 4))
    with pytest.raises(InputError, match="GemmaProcessor"):
        make_vision_adapter(gemma.model, make_qwen().processor.tokenizer)
    assert isinstance(make_vision_adapter(gemma.model, gemma.processor), GemmaVisionAdapter)
    gemma.model.requires_grad_(True)
    with pytest.raises(InputError, match="freeze_gemma"):
        sight.configure(gemma.model, True, None, sight.autocast)


def test_the_tower_costs_the_same_at_every_budget(gemma, image_cases):
    costs = [gemma.seeing(gemma.see(image_cases[0], budget)) for budget in (1, 16, 64)]
    assert costs[0] == costs[1] == costs[2]
    n, d, ffn = 256, 32, 48
    by_hand = 6 * (n * 2 * (4 * d * d + 2 * d * ffn) + 4 * n * n * d) + 2 * n * 192 * d + 2 * 64 * d * 32
    assert costs[0] == by_hand


@pytest.mark.slow
@needs_features
def test_a_saved_performer_answers_alike(gemma, image_cases, tmp_path):
    before = gemma.answer(image_cases, BUDGETS, max_new_tokens=6)
    gemma.save(tmp_path)
    again = load_performer(tmp_path, PerformerConfig(show_options=False), gemma.bank)
    assert isinstance(again, GemmaPerformer)
    after = again.answer(image_cases, BUDGETS, max_new_tokens=6)
    assert [(a.text, a.visual, a.prompt) for a in after] == [(a.text, a.visual, a.prompt) for a in before]
    assert Gemma3ForConditionalGeneration.from_pretrained(tmp_path).config.mm_tokens_per_image == 64
    assert Gemma3ImageProcessorPil.from_pretrained(tmp_path).size["height"] == 128


BLOCKED = """
import sys
sys.modules["torchvision"] = None
from frugalpath.models.build import PerformerConfig, load_performer
from tests.conftest import noise
performer = load_performer(sys.argv[1], PerformerConfig(), None)
views = [performer.processor.sight.view_at(noise(112, 84, 0), 16)]
print(performer.processor.sight.inputs(performer.model, [views])["mm_encoder_outputs"]["image"].pooler_output.shape)
"""


@pytest.mark.slow
@needs_features
def test_it_sees_without_torchvision(gemma, tmp_path):
    gemma.save(tmp_path)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("torch.Size([1, 16, 32])")


def test_an_image_of_a_training_set_is_seen_whole(gemma):
    sight = gemma.processor.sight
    view = sight.view(noise(90, 40, 0))
    assert len(view) == 64 and sight.view(view) is view
