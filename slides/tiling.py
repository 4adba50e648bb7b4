"""The grid of tiles on a slide: which of them hold tissue, where they are, and how they are read in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Square tiles without overlap that cover the scanned part of a slide; the last ones may reach beyond its edge.

    Attributes:
        left, top: level-0 position of the first tile, px.
        step: side of a tile at level 0, px; seldom a whole number.
        columns, rows: how many tiles.
    """

    left: int
    top: int
    step: float
    columns: int
    rows: int

    def coords(self, tiles: np.ndarray, cells: int = 1) -> np.ndarray:
        """Upper left corners at level 0, rounded to pixels.

        Args:
            tiles: (N, 2) row and column of each tile.
            cells: cells per side of a tile.

        Returns:
            (N * cells ** 2, 2) int64 x and y; the cells of a tile follow each other, row by row.
        """
        inner = np.stack(np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij"), -1).reshape(1, -1, 2) / cells
        places = (tiles[:, None] + inner).reshape(-1, 2)[:, ::-1] * self.step
        return np.round(places + np.array([self.left, self.top])).astype(np.int64)


def make_grid(bounds: tuple[int, int, int, int], level0_mpp: float, mpp: float, tile_px: int) -> Grid:
    """The grid of tiles of `tile_px` pixels at `mpp` over `bounds` (x, y, width, height at level 0)."""
    left, top, width, height = bounds
    step = tile_px * mpp / level0_mpp
    return Grid(left, top, step, max(1, math.ceil(width / step)), max(1, math.ceil(height / step)))


def tissue_fraction(grid: Grid, mask: np.ndarray, bounds: tuple[int, int, int, int]) -> np.ndarray:
    """The fraction of each tile's area that is tissue, (rows, columns); beyond the slide there is none.

    Args:
        grid: the tiles.
        mask: bool (h, w) over `bounds`.
        bounds: x, y, width, height at level 0, px, as given to `make_grid`.
    """
    # The sum over a box with fractional edges is a difference of the linearly interpolated cumulative sum.
    sides = grid.step * mask.shape[0] / bounds[3], grid.step * mask.shape[1] / bounds[2]
    total = mask.astype(np.float64)
    for axis, count in ((0, grid.rows), (1, grid.columns)):
        total = np.moveaxis(total, axis, 0)
        cumulative = np.concatenate([np.zeros((1, total.shape[1])), np.cumsum(total, axis=0)])
        edges = np.clip(np.arange(count + 1) * sides[axis], 0, len(total))
        below = np.minimum(edges.astype(int), len(total) - 1)
        at_edges = cumulative[below] + (edges - below)[:, None] * total[below]
        total = np.moveaxis(np.diff(at_edges, axis=0), 0, axis)
    return np.clip(total / (sides[0] * sides[1]), 0, 1)


def select(fraction: np.ndarray, min_tissue: float) -> np.ndarray:
    """Tiles with at least `min_tissue` of tissue (and some), as (N, 2) row and column."""
    return np.argwhere((fraction >= min_tissue) & (fraction > 0))


def cap(tiles: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` tiles, spread evenly over the given ones."""
    if limit is None or len(tiles) <= limit:
        return tiles
    return tiles[np.linspace(0, len(tiles) - 1, limit).round().astype(int)]


@dataclass(frozen=True)
class Block:
    """Neighbouring tiles that are read at once.

    Attributes:
        row, column: the first tile's place in the grid.
        rows, columns: extent in tiles.
        tiles: (n, 2) row and column of the wanted tiles in it.
    """

    row: int
    column: int
    rows: int
    columns: int
    tiles: np.ndarray


def blocks(tiles: np.ndarray, side: int, fill: float = 0.6) -> Iterator[Block]:
    """Group tiles into blocks of at most `side` x `side`, of which at least the fraction `fill` is wanted.

    Reading several tiles at once decodes the file's own tiles once where they straddle ours. Every tile is in
    exactly one block.
    """
    keys = tiles // side
    order = np.lexsort((tiles[:, 1], tiles[:, 0], keys[:, 1], keys[:, 0]))
    cuts = np.flatnonzero(np.any(np.diff(keys[order], axis=0) != 0, axis=1)) + 1
    for group in np.split(tiles[order], cuts):
        if len(group):
            yield from _fitted(group, fill)


def _fitted(tiles: np.ndarray, fill: float) -> Iterator[Block]:
    (row, column), (last_row, last_column) = tiles.min(0), tiles.max(0)
    rows, columns = last_row - row + 1, last_column - column + 1
    if len(tiles) >= fill * rows * columns:
        yield Block(int(row), int(column), int(rows), int(columns), tiles)
        return
    axis = 0 if rows >= columns else 1
    first = tiles[:, axis] < (row + rows // 2, column + columns // 2)[axis]
    yield from _fitted(tiles[first], fill)
    yield from _fitted(tiles[~first], fill)
