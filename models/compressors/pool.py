"""Mean pooling of patch features onto a grid of at most `budget` cells: no parameters, any number of patches.

Nested, a budget is spent on grids of 1, 4, 16 ... cells, from coarse to fine (a pyramid, Lazebnik et al. 2006): the
tokens of a larger budget begin with those of a smaller one, and what a model has read of them it need not read again.
"""

from __future__ import annotations

import numpy as np
import torch

from frugalpath.models.compressors.base import PLACE, Compressor, Tokens


def grid_shape(budget: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of a grid of at most `budget` cells for a field of that width / height.

    Many cells and square ones: the product of the number of cells and their squareness (short side / long side)
    decides, so that 13 tokens of a square field become 3 x 4 and not a strip of 13.
    """
    grids = [(rows, columns) for rows in range(1, budget + 1) for columns in range(1, budget // rows + 1)]
    return max(grids, key=lambda g: (g[0] * g[1] * _squareness(g, aspect), g))


def _squareness(shape: tuple[int, int], aspect: float) -> float:
    ratio = shape[1] / shape[0] / aspect
    return min(ratio, 1 / ratio)


def pool(features: np.ndarray, cells: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Pool patches to at most `budget` tokens.

    A slide or field that has no more patches than the budget is returned as it is.

    Args:
        features: (N, d) float32.
        cells: (N, 3) centre x, centre y, side, in one unit (pixels).
        budget: tokens, at least 1.

    Returns:
        Tokens (n, d) and their places (n, 3), n <= budget; empty grid cells are left out.
    """
    return _pool(features, cells, budget)[:2]


def _pool(features: np.ndarray, cells: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `pool`, and the token (N,) that each patch went into."""
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
    if len(features) <= budget:
        return features, cells, np.arange(len(features))
    low = (cells[:, :2] - cells[:, 2:] / 2).min(0)
    high = (cells[:, :2] + cells[:, 2:] / 2).max(0)
    extent = high - low
    rows, columns = grid_shape(budget, float(extent[0] / extent[1]))
    across = np.minimum((cells[:, 0] - low[0]) / extent[0] * columns, columns - 1e-4).astype(np.int64)
    down = np.minimum((cells[:, 1] - low[1]) / extent[1] * rows, rows - 1e-4).astype(np.int64)
    used, member, count = np.unique(down * columns + across, return_inverse=True, return_counts=True)
    order = np.argsort(member, kind="stable")
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    tokens = np.add.reduceat(features[order], starts, axis=0) / count[:, None]
    centre = np.stack([(used % columns + 0.5) / columns, (used // columns + 0.5) / rows], 1) * extent + low
    side = np.full((len(used), 1), max(extent[0] / columns, extent[1] / rows))
    return tokens.astype(np.float32), np.concatenate([centre, side], 1).astype(cells.dtype), member


def _pyramid(features: np.ndarray, cells: np.ndarray, budget: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What `_pool` gives for 1, 4, 16 ... cells, as long as all of it fits into the budget.

    The patches themselves are the last grid, where they fit.
    """
    grids = [_pool(features, cells, 1)]
    left = budget - len(grids[0][0])
    while len(features) > 4 ** (len(grids) - 1):
        finer = _pool(features, cells, 4 ** len(grids))
        left -= len(finer[0])
        if left < 0:
            break
        grids.append(finer)
    return grids


class Pool(Compressor):
    """`pool` as a compressor. Pooled tokens count the patches of their cell.

    Args:
        dim: width of the features. most: tokens where another compressor follows.
        nested: show grids from coarse to fine while they fit; the budgets of which no token is left over are then 1,
            5, 21, 85, 341 ... (fewer on a slide that has empty cells).
    """

    learned = False

    def __init__(self, dim: int, most: int = 4096, nested: bool = False):
        super().__init__()
        self.out_dim, self.most, self.nested = dim, most, nested

    def room(self, n: int) -> int:
        if not self.nested:
            return n
        finest = next(level for level in range(n + 1) if 4**level >= n)
        return n + sum(4**level for level in range(finest))

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        rows = []
        for slide in tokens.rows():
            values, cells, size = (part.numpy() for part in slide.split([self.out_dim, PLACE, 1], -1))
            grids = _pyramid(values, cells, budget) if self.nested else [_pool(values, cells, budget)]
            counted = [_counted(*grid, size[:, 0]) for grid in grids]
            rows.append(torch.from_numpy(np.concatenate(counted, dtype=np.float32)))
        return Tokens.from_rows(rows)


def _counted(tokens: np.ndarray, places: np.ndarray, member: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Rows (n, d + 4) of a grid; a token counts the patches of its own."""
    counts = np.bincount(member, weights=size, minlength=len(tokens))
    return np.concatenate([tokens, places, counts[:, None]], 1)
