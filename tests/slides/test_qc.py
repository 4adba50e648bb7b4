"""The picture and the GeoJSON of a slide."""

from __future__ import annotations

import json

import numpy as np

from frugalpath.slides.qc import qc_picture, write_geojson, write_picture
from frugalpath.slides.tiling import Grid


def ring_area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    return abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def test_geojson(tmp_path):
    mask = np.zeros((50, 80), bool)
    mask[10:40, 10:50] = True
    mask[20:30, 20:30] = False
    mask[45:48, 70:75] = True
    bounds = (1000, 2000, 800, 500)
    grid = Grid(1000, 2000, 100.0, 8, 5)
    tiles = np.array([[1, 1], [2, 3]])
    write_geojson(tmp_path / "x.geojson", "x", mask, grid, tiles, bounds)
    found = json.loads((tmp_path / "x.geojson").read_text())
    tissue = [f for f in found["features"] if f["properties"]["objectType"] == "annotation"]
    squares = [f for f in found["features"] if f["properties"]["objectType"] == "tile"]
    assert len(tissue) == 2 and len(squares) == 2
    outline, hole = tissue[0]["geometry"]["coordinates"]
    # Level-0 pixels from the corner of the bounds, in closed rings.
    assert abs(ring_area(outline) - 300 * 400) < 0.01 * 300 * 400
    assert abs(ring_area(hole) - 100 * 100) < 0.02 * 100 * 100
    assert np.array(outline).min() >= 99 and outline[0] == outline[-1]
    assert squares[1]["geometry"]["coordinates"] == [[[300, 200], [400, 200], [400, 300], [300, 300], [300, 200]]]
    assert len({f["id"] for f in found["features"]}) == 4


def test_picture(tmp_path):
    thumbnail = np.full((300, 400, 3), 243, np.uint8)
    mask = np.zeros((300, 400), bool)
    mask[100:200, 100:300] = True
    grid = Grid(0, 0, 448.0, 9, 7)
    image = qc_picture(thumbnail, mask, grid, np.array([[3, 4]]), (0, 0, 4000, 3000))
    assert image.size == (1600, 1200)
    pixels = np.asarray(image).astype(int)
    # The tile is tinted blue, the outline is green, what is neither is as it was.
    assert pixels[600, 800][2] > pixels[600, 800][0] + 5
    green = (pixels[..., 1] > pixels[..., 0] + 60) & (pixels[..., 1] > pixels[..., 2] + 30)
    rows = np.flatnonzero(green.any(1))
    assert abs(rows.min() - 400) < 5 and abs(rows.max() - 800) < 5
    np.testing.assert_array_equal(pixels[50, 50], [243] * 3)
    write_picture(tmp_path / "q" / "x.jpg", image)
    assert (tmp_path / "q" / "x.jpg").stat().st_size > 1000
