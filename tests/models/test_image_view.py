from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from frugalpath.errors import InputError
from frugalpath.models.image_view import fit, open_image
from frugalpath.models.qwen_vl import QwenVisionAdapter
from tests.conftest import noise
from tests.models.conftest import views_of

UNIT = 28
IMAGE = 3


# Budgets.

sides = st.one_of(st.integers(1, 60), st.integers(1, 5000))


@given(sides, sides, st.integers(1, 2000))
def test_an_image_never_takes_more_than_its_budget(height, width, budget):
    if max(height, width) > 200 * min(height, width):
        return
    rows, columns = fit(height, width, budget)
    assert rows >= 1 and columns >= 1
    assert rows * columns <= budget
    # Nor more than it has pixels for, to the nearest token along and at least one across.
    assert rows * columns <= max(1, round(height / UNIT)) * max(1, round(width / UNIT)) or 1 in (rows, columns)


@given(st.integers(1, 60), st.integers(28, 3000))
def test_a_square_image_at_a_square_budget_takes_it_whole(k, side):
    assert fit(k * UNIT, k * UNIT, k * k) == (k, k)
    if side >= k * UNIT:
        assert fit(side, side, k * k) == (k, k)


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
    sight = QwenVisionAdapter(IMAGE, processor)
    assert len(sight.view(noise(28, 28, 0))) == 9
    assert len(sight.view(noise(400, 400, 0))) == 16


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


# Files that are no images.


def test_what_is_no_image_is_named(sight, tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        path = str(tmp_path / name)
        for look in (open_image, lambda p: sight.view_at(p, 4), sight.view):
            with pytest.raises(InputError, match=f"{path}: cannot be read as an image .*repair or replace it"):
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
    with pytest.raises(InputError, match=f"{path}: cannot be read as an image .*repair or replace it"):
        sight.inputs(qwen.model, [[view]])


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
    sight.inputs(qwen.model, [[view]])
    assert copy.deepcopy(view).features is view.features


def test_a_pickled_view_is_its_description(qwen, sight, image_cases):
    (view,) = views_of(qwen, image_cases[0], 16)
    sight.prefetch([view])  # neither threads nor pixels are pickled
    assert pickle.loads(pickle.dumps(view)) == f"{image_cases[0].images[0]} as 16 tokens"
    assert pickle.loads(pickle.dumps([sight.view(noise(60, 90, 0))])) == ["image of 60x90 px as 6 tokens"]
