"""Reading ahead keeps the order, passes errors on and gives up on what hangs; tiles show the place they name."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import frugalpath.slides.stream
from frugalpath.errors import InputError
from frugalpath.slides.encoder import load_encoder
from frugalpath.slides.reader import BackendError, SlideReader
from frugalpath.slides.scale import SlideError
from frugalpath.slides.stream import check_tile, encode_tiles, read_ahead, read_thumbnail, read_tiles
from frugalpath.slides.tiling import make_grid


def test_order_is_kept():
    rng = np.random.default_rng(0)
    pauses = rng.random(40) * 0.005

    def call(i: int) -> int:
        time.sleep(pauses[i])
        return i

    assert list(read_ahead(call, range(40), workers=4, timeout=5)) == list(range(40))


def test_it_reads_ahead_and_not_further():
    started = []
    stream = read_ahead(lambda i: started.append(i) or i, range(100), workers=2, timeout=5)
    next(stream)
    time.sleep(0.2)
    assert 2 <= len(started) <= 6
    stream.close()


def test_errors_come_in_their_place():
    def call(i: int) -> int:
        if i == 3:
            raise SlideError("damaged")
        return i

    stream = read_ahead(call, range(10), workers=2, timeout=5)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SlideError, match="damaged"):
        next(stream)


def test_what_hangs_is_given_up():
    release, stuck = threading.Event(), []

    def call(i: int) -> int:
        if i == 1:
            release.wait()
        return i

    stream = read_ahead(call, range(5), workers=2, timeout=0.1, on_stuck=lambda: stuck.append(True))
    assert next(stream) == 0
    with pytest.raises(TimeoutError):
        next(stream)
    assert stuck == [True]
    release.set()


def test_a_reader_that_hangs_is_not_closed(make_slide, monkeypatch):
    release = threading.Event()
    reader = SlideReader(make_slide(), "openslide")
    monkeypatch.setattr(reader, "native", lambda *_: release.wait())
    with pytest.raises(SlideError, match=r"openslide did not answer for 0\.1 s"):
        read_thumbnail(reader, 10, workers=1, timeout=0.1)
    reader.backend = "fastslide"
    with pytest.raises(BackendError):
        read_thumbnail(reader, 10, workers=1, timeout=0.1)
    reader.close()
    assert reader._slide.dimensions  # still open under the thread that hangs
    release.set()


def test_thumbnail(make_slide, monkeypatch):
    path = make_slide(height=1000, width=1300, downs=(1,))
    with SlideReader(path, "openslide") as reader:
        whole = read_thumbnail(reader, 10, workers=2, timeout=60)
        assert whole.shape == (100, 130, 3)
        monkeypatch.setattr(frugalpath.slides.stream, "MAX_READ", 60_000)
        parts = read_thumbnail(reader, 10, workers=2, timeout=60)
        # Parts are resampled for themselves, so that only pixels at their edges may differ.
        assert np.median(np.abs(parts.astype(int) - whole)) == 0
        assert np.abs(parts.astype(int) - whole).mean() < 1


def test_a_level_too_large_to_search(make_slide, monkeypatch):
    monkeypatch.setattr(frugalpath.slides.stream, "MAX_SEARCH", 500_000)
    with SlideReader(make_slide(downs=(1,)), "openslide") as reader, pytest.raises(SlideError, match="pyramid"):
        read_thumbnail(reader, 10, workers=1, timeout=60)


@pytest.fixture
def gradient(make_slide):
    """Red tells x and green y, so that a tile's mean tells its place."""
    y, x = np.mgrid[:1024, :1024]
    image = np.stack([x // 4, y // 4, np.full_like(x, 90)], -1).astype(np.uint8)
    return make_slide(image=image, compression=None, downs=(1, 2))


@pytest.mark.parametrize("mpp", [1.0, 1.3, 2.0, 3.1])
def test_tiles_show_the_place_they_name(gradient, mpp):
    with SlideReader(gradient, "openslide") as reader:
        grid = make_grid(reader.bounds, 1.0, mpp, 64)
        level = reader.best_level(mpp, 0.1)
        tiles = np.argwhere(np.ones((int(1024 // grid.step), int(1024 // grid.step)), bool))
        places, images = zip(*read_tiles(reader, level, grid, tiles, 64, 2, 60), strict=True)
    places, images = np.concatenate(places), np.concatenate(images)
    assert sorted(map(tuple, places)) == sorted(map(tuple, tiles))
    assert images.shape == (len(tiles), 64, 64, 3)
    means = images.reshape(len(images), -1, 3).mean(1)[:, :2] * 4
    # A pixel's grey level tells its place rounded down to four pixels: 1.5 less than its centre's on average.
    expected = grid.coords(places) + grid.step / 2 - 0.5 - 1.5
    np.testing.assert_allclose(means, expected, atol=1.8)  # half a pixel of level 1, and of rounding


def test_a_tile_is_the_same_in_any_block(make_slide):
    with SlideReader(make_slide(), "openslide") as reader:
        grid = make_grid(reader.bounds, 1.0, 1.37, 64)
        tiles = np.argwhere(np.ones((grid.rows, grid.columns), bool))
        together = {}
        for places, images in read_tiles(reader, 0, grid, tiles, 64, 2, 60):
            together |= {tuple(place): image for place, image in zip(places, images, strict=True)}
        for place in tiles[::17]:
            ((_, alone),) = read_tiles(reader, 0, grid, place[None], 64, 1, 60)
            np.testing.assert_array_equal(alone[0], together[tuple(place)])


def test_cells_are_means_of_the_map():
    encoder = load_encoder()
    tiles = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    grid = encoder.feature_map(tiles).numpy()
    np.testing.assert_allclose(encode_tiles(encoder, tiles, 4), grid.reshape(-1, 1280), atol=1e-5)
    pooled = grid.reshape(2, 2, 2, 2, 2, 1280).mean((2, 4)).reshape(-1, 1280)
    np.testing.assert_allclose(encode_tiles(encoder, tiles, 2), pooled, atol=1e-5)
    np.testing.assert_allclose(encode_tiles(encoder, tiles, 1), grid.mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    ("tile_px", "cells", "message"), [(100, 1, "multiples of 32"), (224, 3, "choose one of 1, 7")]
)
def test_tile_sizes_that_do_not_fit(encoder, tile_px, cells, message):
    with pytest.raises(InputError, match=message):
        check_tile(encoder, tile_px, cells)
