"""Reading: what is read is what was written, wherever the box lies and whichever backend reads."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tifffile
from PIL import Image

import frugalpath.slides.reader
from frugalpath.errors import InputError
from frugalpath.slides.reader import SlideReader, resample, within
from frugalpath.slides.scale import SlideError


@pytest.fixture
def gradient(make_slide):
    y, x = np.mgrid[:600, :900]
    image = np.stack([x // 4, y // 4, np.full_like(x, 128)], -1).astype(np.uint8)
    return image, make_slide(image=image, compression=None, downs=(1, 4))


def test_levels_and_exact_pixels(gradient):
    image, path = gradient
    with SlideReader(path, "openslide") as reader:
        assert reader.level_dimensions == ((900, 600), (225, 150))
        np.testing.assert_array_equal(reader.native(0, 100, 50, 300, 200)[..., :3], image[50:250, 100:400])
        np.testing.assert_array_equal(reader.read(0, (100, 50, 400, 250), (300, 200)), image[50:250, 100:400])


def test_beyond_the_edge_is_background(gradient):
    image, path = gradient
    with SlideReader(path, "openslide") as reader:
        found = reader.native(0, 880, -10, 40, 30)
    np.testing.assert_array_equal(found[10:, :20], image[:20, 880:])
    assert np.all(found[:10] == 255) and np.all(found[:, 20:] == 255)


def test_a_box_outside_of_the_slide(gradient):
    with SlideReader(gradient[1], "openslide") as reader:
        assert np.all(reader.read(0, (2000, 2000, 2100, 2100), (10, 10)) == 255)


def test_large_boxes_are_read_in_parts(gradient, monkeypatch):
    path = gradient[1]
    with SlideReader(path, "openslide") as reader:
        whole = reader.read(0, (0, 0, 900, 600), (90, 60))
        monkeypatch.setattr(frugalpath.slides.reader, "MAX_READ", 20_000)
        sizes = []
        native = reader.native
        monkeypatch.setattr(reader, "native", lambda *args: sizes.append(args[3] * args[4]) or native(*args))
        parts = reader.read(0, (0, 0, 900, 600), (90, 60))
    assert len(sizes) > 20 and max(sizes) <= 20_000
    assert np.abs(parts.astype(int) - whole).max() <= 2


def test_resampling_is_pils():
    image = np.random.default_rng(0).integers(0, 256, (443, 445, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BILINEAR))
    found = resample(image, (224, 224))
    assert np.abs(found.astype(int) - expected).max() <= 1
    with_alpha = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(resample(with_alpha, (224, 224)), found)


@pytest.mark.parametrize(
    ("downsample", "tolerance", "level"),
    [(1, 0, 0), (1.9, 0, 0), (1.9, 0.1, 1), (2, 0, 1), (7.9, 0, 1), (8, 0, 2), (100, 0, 2), (0.5, 0.1, 0)],
)
def test_best_level(make_slide, downsample, tolerance, level):
    with SlideReader(make_slide(height=512, width=512, downs=(1, 2, 8)), "openslide") as reader:
        assert reader.best_level(downsample, tolerance) == level


def test_what_is_no_slide(tmp_path):
    (tmp_path / "x.svs").write_bytes(os.urandom(2000))
    with pytest.raises(SlideError, match="not a slide that OpenSlide reads"):
        SlideReader(tmp_path / "x.svs")
    with pytest.raises(SlideError, match="no such file"):
        SlideReader(tmp_path / "absent.svs")
    with pytest.raises(InputError, match="backend"):
        SlideReader(tmp_path / "x.svs", "vips")


def test_an_untiled_tiff_names_the_remedy(tmp_path):
    tifffile.imwrite(tmp_path / "flat.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with pytest.raises(SlideError, match="must be tiled"):
        SlideReader(tmp_path / "flat.tif")


def test_huge_native_tiles_are_refused(make_slide, monkeypatch):
    path = make_slide(height=512, width=512, tile=512, downs=(1,))
    monkeypatch.setattr(frugalpath.slides.reader, "MAX_NATIVE_TILE", 300**2)
    with pytest.raises(SlideError, match="tiles of 512 x 512 px"):
        SlideReader(path)


def test_damage_is_a_slide_error(make_slide, corrupt_tile):
    path = corrupt_tile(make_slide(height=512, width=512, downs=(1,)), 1)
    with SlideReader(path, "openslide") as reader, pytest.raises(SlideError, match="damaged at level 0"):
        reader.read(0, (0, 0, 512, 512), (64, 64))


def test_within():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    import threading

    with pytest.raises(TimeoutError):
        within(0.05, threading.Event().wait)


class TestFastslide:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("fastslide")

    def test_agrees_with_openslide(self, make_slide):
        path = make_slide(downs=(1, 4))
        with SlideReader(path, "fastslide") as fast, SlideReader(path, "openslide") as plain:
            assert fast.backend == "fastslide"
            for level, box in ((0, (17, 33, 600, 500)), (1, (3, 5, 300, 220)), (0, (1200, 900, 1400, 1100))):
                size = (100, 90)
                ours, theirs = (reader.read(level, box, size).astype(int) for reader in (fast, plain))
                assert np.abs(ours - theirs).mean() < 1.5

    def test_auto_falls_back_where_it_cannot_read(self, make_slide):
        path = make_slide(compression=None)  # fastslide 0.8 reads no uncompressed tiles
        with SlideReader(path, "auto") as reader:
            assert reader.backend == "openslide"
        with pytest.raises(SlideError, match="--backend auto"):
            SlideReader(path, "fastslide")


def test_without_fastslide(make_slide, monkeypatch):
    path = make_slide()
    monkeypatch.setattr(frugalpath.slides.reader, "_fastslide", lambda: None)
    with SlideReader(path) as reader:
        assert reader.backend == "openslide"
    with pytest.raises(InputError, match=r"frugalpath\[fast\]"):
        SlideReader(path, "fastslide")
