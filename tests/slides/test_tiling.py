"""Tiles cover the tissue once, at the places that the coordinates tell."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.slides.tiling import blocks, cap, make_grid, select, tissue_fraction

grids = st.builds(
    make_grid,
    st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 5000), st.integers(1, 5000)),
    st.floats(0.2, 4),
    st.floats(0.5, 4),
    st.sampled_from([64, 96, 224, 256]),
)


@given(grids)
def test_tiles_do_not_overlap(grid):
    """No level-0 pixel belongs to two tiles: corners are at least a (whole) tile apart."""
    tiles = np.argwhere(np.ones((min(grid.rows, 30), min(grid.columns, 30)), bool))
    coords = grid.coords(tiles)
    for axis in (0, 1):
        assert np.all(np.diff(np.unique(coords[:, axis])) >= int(grid.step))
    assert len(np.unique(coords, axis=0)) == len(tiles)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.2, 3), st.integers(0, 300), st.sampled_from([64, 224]))
def test_tiles_reach_all_of_the_slide(width, height, level0_mpp, origin, tile_px):
    grid = make_grid((origin, origin, width, height), level0_mpp, 2.0, tile_px)
    assert (grid.columns - 1) * grid.step < width <= grid.columns * grid.step * (1 + 1e-9)
    assert (grid.rows - 1) * grid.step < height <= grid.rows * grid.step * (1 + 1e-9)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.3, 30), st.floats(8, 400), st.integers(0, 2**32 - 1))
def test_all_tissue_is_counted_once(height, width, mask_ratio, step, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    bounds = (0, 0, max(1, round(width * mask_ratio)), max(1, round(height * mask_ratio)))
    grid = make_grid(bounds, 1.0, step / 64, 64)
    fraction = tissue_fraction(grid, mask, bounds)
    assert fraction.shape == (grid.rows, grid.columns)
    pixel = bounds[2] / width * bounds[3] / height
    np.testing.assert_allclose(fraction.sum() * grid.step**2, mask.sum() * pixel, rtol=1e-6, atol=1e-6)
    # What is left out holds less than the threshold, what is kept holds at least that.
    chosen = select(fraction, 0.3)
    kept = np.zeros(fraction.shape, bool)
    kept[tuple(chosen.T)] = True
    assert np.all(fraction[kept] >= 0.3) and np.all(fraction[~kept] < 0.3)


def test_fraction_of_a_known_mask():
    mask = np.zeros((10, 20), bool)
    mask[:, 5:] = True
    grid = make_grid((0, 0, 200, 100), 1.0, 1.0, 100)
    np.testing.assert_allclose(tissue_fraction(grid, mask, (0, 0, 200, 100)), [[0.5, 1.0]])


def test_no_tissue_is_never_selected():
    assert len(select(np.zeros((3, 3)), 0.0)) == 0


@given(st.integers(0, 200), st.integers(1, 100))
def test_cap(count, limit):
    tiles = np.stack([np.arange(count), np.zeros(count, int)], 1)
    kept = cap(tiles, limit)
    assert len(kept) == min(count, limit)
    assert len(np.unique(kept, axis=0)) == len(kept)
    if 1 < limit < count:  # from one end to the other, evenly
        assert kept[0, 0] == 0 and kept[-1, 0] == count - 1
        assert np.ptp(np.diff(kept[:, 0])) <= 1
    assert len(cap(tiles, None)) == count


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_blocks_hold_every_tile_once(rows, columns, side, density, seed):
    tiles = np.argwhere(np.random.default_rng(seed).random((rows, columns)) < density)
    found = list(blocks(tiles, side))
    for block in found:
        assert block.rows <= side and block.columns <= side
        assert len(block.tiles) >= 0.6 * block.rows * block.columns
        assert np.all(block.tiles >= (block.row, block.column))
        assert np.all(block.tiles < (block.row + block.rows, block.column + block.columns))
    together = np.concatenate([block.tiles for block in found]) if found else np.zeros((0, 2), int)
    assert sorted(map(tuple, together)) == sorted(map(tuple, tiles))


@given(st.sampled_from([1, 2, 7]), st.floats(50, 2000))
def test_cells_lie_in_their_tile(cells, step):
    grid = make_grid((10, 20, 5000, 5000), 224 * 2 / step, 2.0, 224)
    tiles = np.array([[0, 0], [1, 2]])
    corners, coords = grid.coords(tiles), grid.coords(tiles, cells).reshape(2, cells, cells, 2)
    np.testing.assert_array_equal(coords[:, 0, 0], corners)
    assert np.all(coords >= corners[:, None, None]) and np.all(coords < corners[:, None, None] + step)
    # Row by row: y changes along the first axis of the cells, x along the second.
    assert np.all(np.ptp(coords[..., 1], axis=2) == 0) and np.all(np.ptp(coords[..., 0], axis=1) == 0)
