"""The tiled pyramid: OpenSlide and tifffile read what was drawn, level by level, in bounded memory."""

import os
import threading

import numpy as np
import openslide
import pytest
import tifffile

from frugalpath.envs.pyramid import halve, write_pyramid
from frugalpath.errors import InputError


def smooth_picture(height: int, width: int) -> np.ndarray:
    """Slow colour waves, which JPEG keeps nearly unchanged."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 40 + y / 90), np.cos(y / 60), np.sin((x - y) / 70)]
    return np.stack([128 + 90 * wave for wave in waves], -1).astype(np.uint8)


def write(path, picture: np.ndarray, **options) -> None:
    height, width = picture.shape[:2]
    options = {"mpp": 1.0, "width": width, "height": height, "quality": 95} | options
    write_pyramid(path, lambda top, rows: picture[top : top + rows], **options)


@pytest.mark.parametrize(("height", "width"), [(896, 896), (515, 1301), (7, 5), (256, 256)])
def test_openslide_reads_every_level(tmp_path, height, width):
    picture = smooth_picture(height, width)
    write(tmp_path / "x.tif", picture, mpp=0.5)
    with openslide.OpenSlide(tmp_path / "x.tif") as slide:
        assert slide.dimensions == (width, height)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        expected = picture
        for level, size in enumerate(slide.level_dimensions):
            assert size == expected.shape[1::-1]
            assert slide.level_downsamples[level] == pytest.approx(2**level, rel=0.01) or min(size) < 64
            seen = np.asarray(slide.read_region((0, 0), level, size).convert("RGB"), np.int16)
            assert np.abs(seen - expected).mean() < 3
            expected = halve(expected)
        assert max(slide.level_dimensions[-1]) <= 256
        assert slide.level_count == 1 or max(slide.level_dimensions[-2]) > 256


def test_tifffile_reads_the_same_colours_and_resolution(tmp_path):
    picture = smooth_picture(300, 600)
    write(tmp_path / "x.tif", picture, mpp=2.0)
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        base = tiff.pages[0]
        assert base.is_tiled
        assert base.compression == tifffile.COMPRESSION.JPEG
        assert base.tags["XResolution"].value == (5000, 1)
        assert np.abs(base.asarray().astype(np.int16) - picture).mean() < 3


def test_strips_do_not_show(tmp_path):
    """Any strip height gives the same file, also where strips end on odd rows of the smaller levels."""
    picture = smooth_picture(1111, 400)
    for name, strip in (("whole", 2400), ("thin", 48)):
        write(tmp_path / f"{name}.tif", picture, tile=48, strip=strip)
    assert (tmp_path / "whole.tif").read_bytes() == (tmp_path / "thin.tif").read_bytes()


def test_draws_one_strip_at_a_time(tmp_path):
    asked = []

    def draw(top: int, rows: int) -> np.ndarray:
        asked.append((top, rows))
        return np.full((rows, 300, 3), 200, np.uint8)

    write_pyramid(tmp_path / "x.tif", draw, width=300, height=700, mpp=1.0, strip=256)
    assert asked == [(0, 256), (256, 256), (512, 188)]


def test_a_failed_write_leaves_nothing(tmp_path):
    def draw(top: int, rows: int) -> np.ndarray:
        if top:
            raise RuntimeError("drawing failed")
        return np.zeros((rows, 300, 3), np.uint8)

    with pytest.raises(RuntimeError, match="drawing failed"):
        write_pyramid(tmp_path / "x.tif", draw, width=300, height=700, mpp=1.0, strip=256)
    assert not os.listdir(tmp_path)


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    """Threads of one process have one process id; each writes its own temporary file all the same."""
    picture = smooth_picture(300, 300)
    threads = [threading.Thread(target=write, args=(tmp_path / "x.tif", picture)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["x.tif"]
    with openslide.OpenSlide(tmp_path / "x.tif") as slide:
        assert slide.dimensions == (300, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "at least 1 px"),
        ({"mpp": 0.0}, "mpp"),
        ({"tile": 100}, "multiple of 16"),
        ({"strip": 300}, "multiple of the tile"),
        ({"quality": 0}, "quality"),
    ],
)
def test_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path / "x.tif", smooth_picture(64, 64), **options)
