"""What the vision tower of a Qwen2.5-VL sees, and how long it is remembered."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from cachetools import LRUCache

from frugalpath.models import qwen_vl
from frugalpath.models.feature_cache import FeatureCache
from frugalpath.models.qwen_vl import QwenVisionAdapter, freeze_vision
from frugalpath.models.vision_adapter import read_prompt
from tests.conftest import needs_features, noise
from tests.models.conftest import views_of, watch


@torch.no_grad()
def stock_features(performer, views) -> list[torch.Tensor]:
    """Features by the stock method, from the stock image processor's own pixels, one image at a time."""
    processor, found = performer.processor.image_processor, []
    for view in views:
        out = processor(images=[view.image()], do_resize=view.resize is None, return_tensors="pt")
        seen = performer.model.model.get_image_features(out["pixel_values"], out["image_grid_thw"])
        found.append(seen.pooler_output[0])
    return found


# What is seen.


@needs_features
@pytest.mark.parametrize("budget", [1, 3, 4, 16, 100])
def test_counted_tokens_grid_and_features_agree(qwen, sight, image_cases, budget):
    for case in image_cases:
        for view in views_of(qwen, case, budget):
            assert 1 <= len(view) <= budget and view.budget == budget
            fields = sight.fields([view])
            assert fields["image_grid_thw"].tolist() == [list(view.grid)]
            assert len(fields["pixel_values"]) == 4 * len(view)
            (shown,) = sight.inputs(qwen.model, [[view]])["mm_encoder_outputs"]["image"].pooler_output
            assert shown is view.features and shown.shape == (len(view), 32)


@needs_features
def test_features_are_those_of_the_stock_tower(qwen, sight, image_cases):
    views = [v for c in image_cases for v in views_of(qwen, c, 12)] + [sight.view(noise(90, 150, 9))]
    expected = stock_features(qwen, views)
    shown = sight.inputs(qwen.model, [views])["mm_encoder_outputs"]["image"].pooler_output
    for features, stock in zip(shown, expected, strict=True):
        assert torch.allclose(features, stock, atol=1e-5, rtol=1e-4)
        assert stock.std() > 0.1
    assert len({round(float(f.mean()), 4) for f in expected}) == len(expected), "images differ"


@pytest.mark.parametrize(("limit", "count"), [(4, 5), (40, 3), (10**6, 1)])
def test_many_views_are_seen_in_parts(qwen, sight, runs, monkeypatch, limit, count):
    monkeypatch.setattr(qwen_vl, "TOWER_PATCHES", limit)
    views = [sight.view(noise(56, 56, i)) for i in range(5)]  # 16 patches each
    sight.see(qwen.model.model, views)
    assert len(runs) == count and sum(runs) == 80
    for view, stock in zip(views, stock_features(qwen, views), strict=True):
        assert torch.allclose(view.features, stock, atol=1e-5)
        assert view.features.untyped_storage().nbytes() == view.features.nbytes, "no other view is kept alive"


@needs_features
def test_a_frozen_tower_sees_a_view_once(qwen, sight, runs, image_cases):
    views = views_of(qwen, image_cases[3], 6)
    sight.prefetch(views)
    first = sight.inputs(qwen.model, [[*views, views[0]]])
    again = sight.inputs(qwen.model, [[*views, views[0]]])
    assert len(runs) == 1 and runs[0] == sum(4 * len(v) for v in views)
    assert sight.seen == 2
    outs = [x["mm_encoder_outputs"]["image"].pooler_output for x in (first, again)]
    assert all(a is b for a, b in zip(*outs, strict=True))
    assert not any(v.features.requires_grad for v in views)
    assert all(v.job is None for v in views), "patches are let go"
    sight.inputs(qwen.model, [views, [sight.view_at(views[0].source, 1)]])
    assert runs[1:] == [4], "another budget is another view; only it is seen"


def test_a_frozen_tower_runs_in_every_forward_on_demand(qwen, sight, runs, image_cases):
    sight.configure(qwen.model, False, None, nullcontext)
    views = views_of(qwen, image_cases[0], 16)
    for count in (1, 2):
        inputs = sight.inputs(qwen.model, [views])
        assert set(inputs) == {"pixel_values", "image_grid_thw"}
        assert views[0].features is None
        qwen.model(**prompt_inputs(qwen, views), **inputs)
        assert len(runs) == count


def prompt_inputs(performer, views) -> dict[str, torch.Tensor]:
    """Ids and positions of a short text after the views."""
    parts = [*({"type": "image", "image": v} for v in views), {"type": "text", "text": "What?"}]
    prompt = read_prompt(performer.processor, performer.processor.sight, [{"role": "user", "content": parts}])
    return {"input_ids": prompt.ids[None], "position_ids": prompt.positions[:, None]}


def test_a_tower_that_trains_has_gradients(make_qwen, image_cases):
    performer = make_qwen(freeze_vision=False)
    visual = performer.model.model.visual
    views = views_of(performer, image_cases[3], 12)
    # A sight that was told to see once knows that this tower changes.
    performer.processor.sight.configure(performer.model, True, None, nullcontext)
    for _ in range(2):
        performer.model.zero_grad()
        inputs = {**prompt_inputs(performer, views), **performer.processor.sight.inputs(performer.model, [views])}
        performer.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in visual.parameters() if p.ndim > 1)
        assert all(v.features is None for v in views)


@needs_features
def test_an_unconfigured_sight_does_not_remember_a_tower_that_trains(make_qwen, image_cases):
    performer = make_qwen(freeze_vision=False)
    views = views_of(performer, image_cases[0], 4)
    assert set(performer.processor.sight.inputs(performer.model, [views])) == {"pixel_values", "image_grid_thw"}
    freeze_vision(performer.model)
    assert set(performer.processor.sight.inputs(performer.model, [views])) == {"mm_encoder_outputs"}


@needs_features
def test_a_copied_tower_sees_for_a_model_whose_own_holds_nothing(qwen, sight, image_cases):
    """As on a process that has none of its weights."""
    views, copied = views_of(qwen, image_cases[3], 6), views_of(qwen, image_cases[3], 6)
    expected = stock_features(qwen, views)
    sight.keep_tower(qwen.model, torch.device("cpu"))
    sight.configure(qwen.model, True, None, nullcontext)
    for parameter in qwen.model.model.visual.parameters():
        parameter.data = torch.empty(0)
    sight.inputs(qwen.model, [copied])
    assert all(torch.allclose(v.features, own) for v, own in zip(copied, expected, strict=True))


def test_a_tower_that_trains_is_not_copied(make_qwen):
    performer = make_qwen(freeze_vision=False)
    performer.processor.sight.keep_tower(performer.model, torch.device("cpu"))
    assert performer.processor.sight.eyes(performer.model) is performer.model.model


def test_a_model_that_takes_no_features_gets_pixels(qwen, sight, image_cases, monkeypatch):
    monkeypatch.setattr(qwen_vl, "takes_features", lambda base: False)
    views = views_of(qwen, image_cases[0], 4)
    assert set(sight.inputs(qwen.model, [views])) == {"pixel_values", "image_grid_thw"}


@torch.no_grad()
def test_pixels_and_features_give_the_same_logits(qwen, sight, image_cases):
    for case in image_cases[:4]:
        views = views_of(qwen, case, 12)
        text = prompt_inputs(qwen, views)
        by_features = qwen.model(**text, **sight.inputs(qwen.model, [views])).logits
        by_pixels = qwen.model(**text, **sight.fields(views)).logits
        assert torch.allclose(by_features, by_pixels, atol=1e-5)


def test_no_views_no_inputs(qwen, sight):
    assert sight.inputs(qwen.model, []) == {} and sight.fields([]) == {}


# Features that outlive their views.


def test_another_view_of_what_was_seen_runs_no_tower(qwen, sight, runs, tmp_path):
    path = str(tmp_path / "image.png")
    noise(112, 112, 0).save(path)
    os.utime(path, (1, 1))
    sights = [lambda: sight.view_at(path, 16), lambda: sight.view(noise(112, 84, 1))]
    for make in sights:
        first, second = make(), make()
        before = len(runs)
        sight.see(qwen.model.model, [first])
        sight.see(qwen.model.model, [second])
        assert len(runs) == before + 1
        assert second.features is first.features
        assert set(sight.fields([second])) == {"pixel_values", "image_grid_thw"}, "pixels are still to be had"
        assert torch.equal(sight.fields([second])["pixel_values"], sight.fields([make()])["pixel_values"])
    sight.see(qwen.model.model, [sight.view_at(path, 4)])
    assert len(runs) == 3, "another budget is not the same"
    noise(112, 112, 2).save(path)
    changed = sight.view_at(path, 16)
    sight.see(qwen.model.model, [changed])
    assert len(runs) == 4, "another content is not the same"
    (expected,) = stock_features(qwen, [changed])
    assert torch.allclose(changed.features, expected, atol=1e-5)


def test_a_new_configuration_forgets_what_was_seen(qwen, sight, runs, image_cases):
    for count in (1, 2):
        sight.see(qwen.model.model, views_of(qwen, image_cases[0], 16))
        assert len(runs) == count
        sight.configure(qwen.model, True, None, nullcontext)


def test_memory_of_features_is_limited(qwen, sight, runs):
    sight.held = LRUCache(2 * 16 * 32 * 4, getsizeof=sight.held.getsizeof)  # two images of 16 tokens
    for index in (0, 1, 0, 2, 0, 1):
        sight.see(qwen.model.model, [sight.view(noise(112, 112, index))])
    assert len(runs) == 4, "1 was used least recently when 2 came"
    sight.see(qwen.model.model, [sight.view(noise(224, 224, 9))])  # 64 tokens: more than all of it
    assert sight.held.currsize == 2 * 16 * 32 * 4


# Features that outlive the run.


def cached(performer, folder: Path, **options) -> tuple[QwenVisionAdapter, list[int]]:
    sight = performer.processor.sight
    sight.configure(performer.model, True, FeatureCache(folder, **options), nullcontext)
    return sight, watch(performer)


@needs_features
def test_a_second_run_never_runs_the_tower(make_qwen, image_cases, tmp_path):
    first, second = make_qwen(), make_qwen()
    sight, runs = cached(first, tmp_path)
    views = [v for c in image_cases for v in views_of(first, c, 9)] + [sight.view(noise(56, 84, 5))]
    sight.inputs(first.model, [views])
    assert len(runs) == 1 and sight.seen == len(views)
    later, none = cached(second, tmp_path)
    again = [v for c in image_cases for v in views_of(second, c, 9)] + [later.view(noise(56, 84, 5))]
    later.inputs(second.model, [again])
    assert none == [] and later.seen == 0
    assert all(torch.equal(a.features, b.features) for a, b in zip(views, again, strict=True))
    assert later.cache is not None and later.cache.hits == len(views)
    later.see(second.model.model, views_of(second, image_cases[3], 9))
    assert later.cache.hits == len(views), "now they are in memory"


def test_what_changes_the_features_changes_their_key(make_qwen, image_cases, tmp_path):
    performer = make_qwen()
    path = image_cases[0].images[0]
    sight, runs = cached(performer, tmp_path)
    sight.see(performer.model.model, [sight.view_at(path, 16)])
    sight.see(performer.model.model, [sight.view_at(path, 9)])  # another budget
    sight.see(performer.model.model, [sight.view_at(image_cases[4].images[0], 16)])  # another image
    assert len(runs) == 3
    other = make_qwen()
    with torch.no_grad():
        other.model.model.visual.blocks[0].mlp.up_proj.bias += 0.1
    theirs, ran = cached(other, tmp_path)
    theirs.see(other.model.model, [theirs.view_at(path, 16)])
    assert len(ran) == 1


def test_a_resize_of_ours_and_of_the_processor_are_not_mistaken(make_qwen, tmp_path):
    performer = make_qwen()
    sight, runs = cached(performer, tmp_path / "cache")
    path = str(tmp_path / "image.png")
    noise(130, 100, 0).save(path)  # 5 x 4 tokens by both
    views = [sight.view_at(path, 100), sight.view(path)]
    assert views[0].grid == views[1].grid
    sight.see(performer.model.model, views[:1])
    sight.see(performer.model.model, views[1:])
    assert len(runs) == 2


@needs_features
def test_kept_features_may_be_rounded(make_qwen, image_cases, tmp_path):
    first, second = make_qwen(), make_qwen()
    sight, _ = cached(first, tmp_path, dtype=torch.bfloat16)
    (view,) = views_of(first, image_cases[0], 16)
    sight.see(first.model.model, [view])
    third = make_qwen()
    exact_sight, ran = cached(third, tmp_path)
    exact_sight.see(third.model.model, views_of(third, image_cases[0], 16))
    assert len(ran) == 1, "rounded features do not pass for exact ones"
    later, none = cached(second, tmp_path, dtype=torch.bfloat16)
    (again,) = views_of(second, image_cases[0], 16)
    inputs = later.inputs(second.model, [[again]])
    assert none == [] and again.features.dtype == torch.bfloat16
    with torch.no_grad():
        text = prompt_inputs(second, [again])
        rounded = second.model(**text, **inputs).logits
        exact = second.model(**text, **sight.inputs(second.model, [[view]])).logits
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.1)
