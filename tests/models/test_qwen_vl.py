from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from cachetools import LRUCache
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models import qwen_vl
from models.build import PerformerConfig, lora_config
from models.feature_cache import FeatureCache
from models.performer import QwenPerformer
from models.processor import token_types
from models.qwen_vl import ImageView, QwenProcessor, QwenSight, backbone, fit, freeze_vision, is_frozen, open_image
from models.sight import read_prompt
from models.tokenizer import IMAGE_TOKEN
from slides.errors import InputError
from tests.conftest import noise

UNIT = 28
IMAGE = 3


@pytest.fixture
def sight(qwen) -> QwenSight:
    return qwen.processor.sight


@pytest.fixture
def runs(qwen) -> list[int]:
    """Patches of every run of the vision tower."""
    return watch(qwen)


def watch(performer) -> list[int]:
    patches: list[int] = []
    visual = backbone(performer.model).visual
    visual.register_forward_hook(lambda module, inputs, out: patches.append(len(inputs[0])))
    return patches


def views_of(performer, case, budget) -> list[ImageView]:
    """New views, which remember nothing."""
    return [performer.processor.sight.view_at(path, budget) for path in case.images]


@torch.no_grad()
def stock_features(performer, views) -> list[torch.Tensor]:
    """Features by the stock method, from the stock image processor's own pixels, one image at a time."""
    processor, found = performer.processor.image_processor, []
    for view in views:
        out = processor(images=[view.image()], do_resize=view.resize is None, return_tensors="pt")
        seen = performer.model.model.get_image_features(out["pixel_values"], out["image_grid_thw"])
        found.append(seen.pooler_output[0])
    return found


# Budgets.

sides = st.one_of(st.integers(1, 60), st.integers(1, 5000))


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.integers(1, 2000))
def test_an_image_never_takes_more_than_its_budget(height, width, budget):
    if max(height, width) > 200 * min(height, width):
        return
    rows, columns = fit(height, width, budget)
    assert rows >= 1 and columns >= 1
    assert rows * columns <= budget
    # Nor more than it has pixels for, to the nearest token along and at least one across.
    assert rows * columns <= max(1, round(height / UNIT)) * max(1, round(width / UNIT)) or 1 in (rows, columns)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(28, 3000))
def test_a_square_image_at_a_square_budget_takes_it_whole(k, side):
    assert fit(k * UNIT, k * UNIT, k * k) == (k, k)
    if side >= k * UNIT:
        assert fit(side, side, k * k) == (k, k)


@settings(max_examples=100, deadline=None)
@given(st.integers(100, 3000), st.integers(100, 3000), st.integers(64, 1024))
def test_sides_are_within_a_token_of_the_aspect_ratio(height, width, budget):
    if max(height, width) > 4 * min(height, width):
        return
    rows, columns = fit(height, width, budget)
    scale = min(1.0, (budget * UNIT**2 / (height * width)) ** 0.5)
    assert abs(rows - scale * height / UNIT) < 1
    assert abs(columns - scale * width / UNIT) < 1


@pytest.mark.parametrize(
    ("height", "width", "budget", "expected"),
    [
        (896, 896, 1024, (32, 32)),
        (896, 896, 1, (1, 1)),
        (56, 56, 1024, (2, 2)),  # not enlarged
        (10, 10, 16, (1, 1)),
        (28, 5600, 16, (1, 16)),
        (5600, 28, 16, (16, 1)),
        (3, 600, 4, (1, 4)),
        (13, 300, 3, (1, 3)),
        (300, 13, 3, (3, 1)),
    ],
)
def test_narrow_and_small_images(height, width, budget, expected):
    assert fit(height, width, budget) == expected


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(sight, image_cases, budget):
    with pytest.raises(ValueError, match=f"budget of {budget} tokens"):
        fit(100, 100, budget)
    with pytest.raises(InputError, match=f"{image_cases[0].images[0]}: a budget of {budget} tokens"):
        sight.view_at(image_cases[0].images[0], budget)


def test_too_narrow_an_image_is_named(sight, tmp_path):
    path = str(tmp_path / "line.png")
    noise(603, 3, 0).save(path)
    with pytest.raises(InputError, match=rf"{path}: .*200.*crop the image"):
        sight.view_at(path, 16)
    with pytest.raises(InputError, match=rf"{path}: .*200.*crop the image"):
        sight.view(path)
    with pytest.raises(InputError, match=r"an image of the training set: .*200.*crop the image"):
        sight.view(noise(603, 3, 0))


# Positions.

texts = st.integers(1, 6)
grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
layouts = st.tuples(st.integers(0, 4), st.lists(st.tuples(grids, texts), max_size=4), st.integers(0, 4))


@pytest.fixture(scope="module")
def plain(make_qwen) -> QwenPerformer:
    """One whose state no test changes."""
    return make_qwen()


def stock_positions(performer, ids: torch.Tensor, views) -> tuple[torch.Tensor, int]:
    """Positions (3, P) and the position after them, by the stock model."""
    typed = token_types(ids, performer.processor.image_token_id)[None]
    grid = torch.tensor([v.grid for v in views]) if views else None
    places, delta = performer.model.model.get_rope_index(ids[None], typed, grid)
    return places[:, 0], int(delta) + len(ids)


@settings(max_examples=100, deadline=None)
@given(layout=layouts)
def test_positions_are_those_of_the_stock_model(plain, layout):
    before, images, after = layout
    ids, views = [7] * before, []
    for (rows, columns), text in images:
        views.append(ImageView("", (1, 2 * rows, 2 * columns), 2, None))
        ids += [plain.processor.image_token_id] * len(views[-1]) + [7] * text
    ids += [8] * (after + (not ids))
    row = torch.tensor(ids)
    ours = plain.processor.sight.positions(row, views)
    expected, following = stock_positions(plain, row, views)
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    assert int(ours.max()) + 1 == following or ids[-1] == plain.processor.image_token_id


def test_positions_of_rendered_prompts_are_those_of_the_stock_model(qwen, image_cases):
    for case, budget in zip(image_cases, (16, 12, 8, 10, 5, 12), strict=True):
        prompt = qwen.prompt(case, budget)
        expected, following = stock_positions(qwen, prompt.ids, prompt.views)
        assert torch.equal(prompt.positions, expected)
        assert prompt.next_position == following


def test_two_images_side_by_side_stay_two(qwen, image_cases):
    prompt = qwen.prompt(image_cases[3], 12)
    start, end, image = qwen.processor.tokenizer.convert_tokens_to_ids([*qwen_vl.VISION_MARKS, IMAGE_TOKEN])
    counts = [len(v) for v in prompt.views]
    assert len(counts) == 2 and min(counts) > 1
    marked = [t for n in counts for t in (start, *[image] * n, end)]
    ids = prompt.ids.tolist()
    at = ids.index(start)
    assert ids[at : at + len(marked)] == marked
    assert ids.count(start) == ids.count(end) == 2


# What is seen.


def test_an_image_without_a_budget_is_read_as_the_stock_processor_reads_it(sight, tmp_path):
    processor = sight.processor
    images = [noise(150, 60, 1), noise(30, 30, 2), noise(400, 300, 3), noise(20, 90, 4)]
    images += [noise(112, 84, 5).convert(mode) for mode in ("L", "RGBA", "P", "CMYK", "1")]
    stock = processor(images=images, return_tensors="pt")
    views = [sight.view(image) for image in images]
    fields = sight.fields(views)
    assert torch.equal(fields["pixel_values"], stock["pixel_values"])
    assert torch.equal(fields["image_grid_thw"], stock["image_grid_thw"])
    assert [len(v) for v in views] == (stock["image_grid_thw"].prod(-1) // 4).tolist()
    assert sight.view(views[0]) is views[0]
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        images[0].save(path)
        assert torch.equal(sight.fields([sight.view(path)])["pixel_values"], sight.fields(views[:1])["pixel_values"])


def test_limits_of_the_image_processor_hold_without_a_budget():
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 9 * 784, "longest_edge": 16 * 784})
    sight = QwenSight(IMAGE, processor)
    assert len(sight.view(noise(28, 28, 0))) == 9
    assert len(sight.view(noise(400, 400, 0))) == 16


@pytest.mark.parametrize("budget", [1, 3, 4, 16, 100])
def test_counted_tokens_grid_and_features_agree(qwen, sight, image_cases, budget):
    for case in image_cases:
        for view in views_of(qwen, case, budget):
            assert 1 <= len(view) <= budget and view.budget == budget
            fields = sight.fields([view])
            assert fields["image_grid_thw"].tolist() == [list(view.grid)]
            assert len(fields["pixel_values"]) == 4 * len(view)
            (shown,) = sight.inputs(qwen.model, [view])["mm_encoder_outputs"]["image"].pooler_output
            assert shown is view.features and shown.shape == (len(view), 32)


def test_an_image_is_resized_once_to_its_budget(sight, tmp_path):
    path = str(tmp_path / "image.png")
    image = noise(300, 200, 0)
    image.save(path)
    view = sight.view_at(path, 12)
    rows, columns = fit(200, 300, 12)
    assert view.image().size == (columns * UNIT, rows * UNIT)
    by_hand = image.resize((columns * UNIT, rows * UNIT), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(view.image()), np.asarray(by_hand))
    stock = sight.processor(images=[by_hand], do_resize=False, return_tensors="pt")
    assert torch.equal(sight.fields([view])["pixel_values"], stock["pixel_values"])
    # An image that is right already is not touched, so that the stock processor sees the same.
    noise(112, 112, 1).save(path)
    stock = sight.processor(images=[noise(112, 112, 1)], return_tensors="pt")
    assert torch.equal(sight.fields([sight.view_at(path, 16)])["pixel_values"], stock["pixel_values"])


def test_features_are_those_of_the_stock_tower(qwen, sight, image_cases):
    views = [v for c in image_cases for v in views_of(qwen, c, 12)] + [sight.view(noise(90, 150, 9))]
    expected = stock_features(qwen, views)
    shown = sight.inputs(qwen.model, views)["mm_encoder_outputs"]["image"].pooler_output
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


def test_a_frozen_tower_sees_a_view_once(qwen, sight, runs, image_cases):
    views = views_of(qwen, image_cases[3], 6)
    sight.prefetch(views)
    first = sight.inputs(qwen.model, [*views, views[0]])
    again = sight.inputs(qwen.model, [*views, views[0]])
    assert len(runs) == 1 and runs[0] == sum(4 * len(v) for v in views)
    assert sight.seen == 2
    outs = [x["mm_encoder_outputs"]["image"].pooler_output for x in (first, again)]
    assert all(a is b for a, b in zip(*outs, strict=True))
    assert not any(v.features.requires_grad for v in views)
    assert all(v.job is None for v in views), "patches are let go"
    sight.inputs(qwen.model, [*views, sight.view_at(views[0].source, 1)])
    assert runs[1:] == [4], "another budget is another view; only it is seen"


def test_a_frozen_tower_runs_in_every_forward_on_demand(qwen, sight, runs, image_cases):
    sight.configure(qwen.model, False, None, nullcontext)
    views = views_of(qwen, image_cases[0], 16)
    for count in (1, 2):
        inputs = sight.inputs(qwen.model, views)
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
        inputs = {**prompt_inputs(performer, views), **performer.processor.sight.inputs(performer.model, views)}
        performer.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in visual.parameters() if p.ndim > 1)
        assert all(v.features is None for v in views)


def test_an_unconfigured_sight_does_not_remember_a_tower_that_trains(make_qwen, image_cases):
    performer = make_qwen(freeze_vision=False)
    views = views_of(performer, image_cases[0], 4)
    assert set(performer.processor.sight.inputs(performer.model, views)) == {"pixel_values", "image_grid_thw"}
    freeze_vision(performer.model)
    assert set(performer.processor.sight.inputs(performer.model, views)) == {"mm_encoder_outputs"}


def test_a_model_that_takes_no_features_gets_pixels(qwen, sight, image_cases, monkeypatch):
    monkeypatch.setattr(qwen_vl, "takes_features", lambda base: False)
    views = views_of(qwen, image_cases[0], 4)
    assert set(sight.inputs(qwen.model, views)) == {"pixel_values", "image_grid_thw"}


@torch.no_grad()
def test_pixels_and_features_give_the_same_logits(qwen, sight, image_cases):
    for case in image_cases[:4]:
        views = views_of(qwen, case, 12)
        text = prompt_inputs(qwen, views)
        by_features = qwen.model(**text, **sight.inputs(qwen.model, views)).logits
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


def cached(performer, folder: Path, **options) -> tuple[QwenSight, list[int]]:
    sight = performer.processor.sight
    sight.configure(performer.model, True, FeatureCache(folder, **options), nullcontext)
    return sight, watch(performer)


def test_a_second_run_never_runs_the_tower(make_qwen, image_cases, tmp_path):
    first, second = make_qwen(), make_qwen()
    sight, runs = cached(first, tmp_path)
    views = [v for c in image_cases for v in views_of(first, c, 9)] + [sight.view(noise(56, 84, 5))]
    sight.inputs(first.model, views)
    assert len(runs) == 1 and sight.seen == len(views)
    later, none = cached(second, tmp_path)
    again = [v for c in image_cases for v in views_of(second, c, 9)] + [later.view(noise(56, 84, 5))]
    later.inputs(second.model, again)
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
    inputs = later.inputs(second.model, [again])
    assert none == [] and again.features.dtype == torch.bfloat16
    with torch.no_grad():
        text = prompt_inputs(second, [again])
        rounded = second.model(**text, **inputs).logits
        exact = second.model(**text, **sight.inputs(second.model, [view])).logits
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.1)


# Files that are no images.


def test_what_is_no_image_is_named(sight, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        path = str(tmp_path / name)
        for look in (open_image, lambda p: sight.view_at(p, 4), sight.view):
            with pytest.raises(InputError, match=f"{path}: cannot be read as an image .*mend or replace it"):
                look(path)
    noise(100, 100, 0).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"large\.png: cannot be read as an image"):
        sight.view_at(str(tmp_path / "large.png"), 4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_file_that_was_cut_short_is_named(qwen, sight, tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise(200, 200, 0).save(path)
    os.truncate(path, path.stat().st_size // 2)
    view = sight.view_at(str(path), 4)  # its head is whole
    with pytest.raises(InputError, match=f"{path}: cannot be read as an image .*mend or replace it"):
        sight.inputs(qwen.model, [view])


def test_files_are_not_held_open(sight, image_cases):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else pytest.skip("no /proc")
    views = [sight.view(image_cases[0].images[0]) for _ in range(50)]
    views += [sight.view_at(image_cases[0].images[0], 4) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) < before + 50
    assert len(views) == 100


@pytest.mark.parametrize("image", [3, np.zeros((4, 4, 3)), None])
def test_other_things_are_not_seen(sight, image):
    with pytest.raises(InputError, match=f"is a {type(image).__name__}; give a PIL image or a path"):
        sight.view(image)


def test_limits_that_change_after_the_prompt_are_noticed(sight):
    view = sight.view(noise(308, 308, 0))
    sight.processor.size = {"shortest_edge": 784, "longest_edge": 4 * 784}
    with pytest.raises(InputError, match=rf"{len(view)} visual tokens were counted.*\[1, 4, 4\]"):
        sight.fields([view])


# Views travel with prompts.


def test_a_copied_view_is_the_view(qwen, sight, image_cases):
    (view,) = views_of(qwen, image_cases[0], 16)
    conversation = qwen.messages(image_cases[0], [view])
    again = copy.deepcopy(conversation)
    assert again is not conversation
    assert again[0]["content"][0]["image"] is view
    sight.inputs(qwen.model, [view])
    assert copy.deepcopy(view).features is view.features


def test_a_pickled_view_is_its_description(qwen, sight, image_cases):
    (view,) = views_of(qwen, image_cases[0], 16)
    sight.prefetch([view])  # neither threads nor pixels are pickled
    assert pickle.loads(pickle.dumps(view)) == f"{image_cases[0].images[0]} as 16 tokens"
    assert pickle.loads(pickle.dumps([sight.view(noise(60, 90, 0))])) == ["image of 60x90 px as 6 tokens"]


# Wrappers, saving.


def test_the_backbone_is_found_within_wrappers(qwen):
    base = qwen.model.model
    wrapped = torch.nn.Module()
    wrapped.module = qwen.model
    adapted = get_peft_model(qwen.model, lora_config(PerformerConfig(family="qwen_vl", lora={"r": 2})))
    around = torch.nn.Module()
    around.module = adapted
    assert all(backbone(m) is base for m in (base, qwen.model, wrapped, adapted, around))


def test_freezing_leaves_the_language_model(make_qwen):
    performer = make_qwen(freeze_vision=False)
    base = performer.model.model
    assert not is_frozen(base.visual)
    freeze_vision(performer.model)
    assert is_frozen(base.visual)
    assert all(p.requires_grad for p in base.language_model.parameters())
    assert performer.model.lm_head.weight.requires_grad


def test_a_saved_performer_answers_alike(qwen, image_cases, tmp_path):
    budgets = (16, 8, 0, 12, 4, 9)
    qwen.processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 10 * 784}
    before = qwen.answer(image_cases, budgets, max_new_tokens=6)
    assert len({a.text for a in before}) > 2
    qwen.save(tmp_path)
    again = QwenPerformer.load(tmp_path, qwen.bank, show_options=False)
    again.model.eval()
    after = again.answer(image_cases, budgets, max_new_tokens=6)
    assert [(a.text, a.visual, a.prompt) for a in after] == [(a.text, a.visual, a.prompt) for a in before]
    assert again.processor.tokenizer.padding_side == "left"
    assert len(again.processor.sight.view(noise(500, 500, 0))) == 9, "the processor's limits were saved"
    assert is_frozen(again.model.model.visual)
    assert not is_frozen(QwenPerformer.load(tmp_path, qwen.bank, frozen=False).model.model.visual)


def test_stock_transformers_reads_a_saved_folder(qwen, image_cases, tmp_path):
    qwen.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = processor(images=[Image.open(image_cases[0].images[0])], return_tensors="pt")
    count = int(image["image_grid_thw"].prod()) // 4
    start, end = qwen_vl.VISION_MARKS
    question = image_cases[0].prompt
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": start + IMAGE_TOKEN * count + end + question}],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    typed = token_types(ids["input_ids"], model.config.image_token_id)
    out = model.generate(**ids, **image, mm_token_type_ids=typed, max_new_tokens=6, do_sample=False)
    (ours,) = qwen.answer(image_cases[:1], [16], max_new_tokens=6)
    assert count == ours.visual == 16
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == ours.text


def test_the_processor_types_image_tokens_for_the_stock_forward(qwen, image_cases):
    views = views_of(qwen, image_cases[3], 12)
    messages = qwen.messages(image_cases[3], views)
    out = qwen.processor.apply_chat_template([messages], tokenize=True, return_dict=True, add_generation_prompt=True)
    assert set(out) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    image = qwen.processor.image_token_id
    assert out["mm_token_type_ids"] == [[int(t == image) for t in out["input_ids"][0]]]
    assert sum(out["mm_token_type_ids"][0]) == sum(map(len, views))
    assert out["input_ids"][0] == qwen.prompt(image_cases[3], 24).ids.tolist()


BLOCKED = """
import sys
sys.modules["torchvision"] = None
from models.qwen_vl import QwenProcessor
from tests.conftest import noise
processor = QwenProcessor.load(sys.argv[1])
view = processor.sight.view(noise(112, 84, 0))
out = processor(images=[[view]], text=[processor.image_text], return_tensors="pt")
print(out["image_grid_thw"].tolist(), out["input_ids"].shape[1])
"""


def test_images_are_processed_without_torchvision(qwen, tmp_path):
    qwen.save(tmp_path)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", BLOCKED, str(tmp_path)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[[1, 6, 8]] 14"


def test_an_image_in_a_text_stands_between_marks(qwen):
    again = QwenProcessor(Qwen2VLImageProcessorPil(), qwen.processor.tokenizer)
    assert again.image_token_id == qwen.model.config.image_token_id
    assert again.image_text == "<|vision_start|><|image_pad|><|vision_end|>"
