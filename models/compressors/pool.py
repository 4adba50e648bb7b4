"""Mean pooling of patch features onto a grid of at most `budget` cells: no parameters, any number of patches."""

from __future__ import annotations

import math

import numpy as np


def grid_shape(budget: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of the fullest grid with at most `budget` cells for a field of that width / height."""
    best = (1, 1)
    for rows in range(1, budget + 1):
        columns = min(budget // rows, max(1, round(rows * aspect)))
        candidate = (rows, columns)
        # As many cells as the budget gives; among equals the squarest cells.
        if (rows * columns, -_skew(candidate, aspect)) > (best[0] * best[1], -_skew(best, aspect)):
            best = candidate
    return best


def _skew(shape: tuple[int, int], aspect: float) -> float:
    return abs(math.log(shape[1] / shape[0] / aspect))


def pool(features: np.ndarray, cells: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Pool patches to at most `budget` tokens.

    A slide or field that has no more patches than the budget is returned as it is.

    Args:
        features: (N, d) float32.
        cells: (N, 3) centre x, centre y, side, in 0..1 of the field.
        budget: tokens, at least 1.

    Returns:
        Tokens (n, d) and their places (n, 3), n <= budget; empty grid cells are left out.
    """
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
    if len(features) <= budget:
        return features, cells
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
    return tokens.astype(np.float32), np.concatenate([centre, side], 1).astype(np.float32)
