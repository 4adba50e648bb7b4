"""Sparse token merger: neighbouring patches that look alike become one token; those that stand out stay alone.

A reconstruction: LoC-Path (Hu et al. 2025, arXiv 2512.05391) names the module and its purpose, to remove local
redundancy, but its equations are not known. Windows, cosine merging and sizes follow what is stated of it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import PLACE, Compressor, Tokens

FALL = 0.05
"""How far below the most alike pair the threshold falls in one step, where more has to merge."""

CROWD = 256
"""Tokens a window at most, on average, before the windows double: it bounds the comparisons for any features."""


class SparseTokenMerger(Compressor):
    """Tokens merge within spatial windows, the most alike first.

    1. In every window, each token whose cosine similarity to the one most like it exceeds the threshold merges with
       it, to their size-weighted mean; that is repeated with what came of it until no pair exceeds the threshold.
    2. While more than the budget are left, the windows double and the same is done, up to the whole slide.
    3. Then the threshold falls step by step until the budget is met. It falls earlier only on a slide where more than
       `CROWD` tokens a window would have to be compared.

    So a patch unlike all others merges last, and a dull slide keeps few tokens where a varied one keeps many. Features
    are compared as they are: with the slide's mean taken off, noise would be all that is left of a uniform slide, and
    nothing in it would merge.

    Args:
        dim: width of the features.
        window: side of the first windows in patches.
        threshold: cosine similarity above which tokens merge.
        most: tokens where another compressor follows.
    """

    learned = False

    def __init__(self, dim: int, window: int = 2, threshold: float = 0.9, most: int = 4096):
        super().__init__()
        limits = {"window": (window, 2, np.inf), "threshold": (threshold, 0, 1), "most": (most, 1, np.inf)}
        problems = [
            f"performer.compressors: stm: {name} {value}: must lie in {low} to {high}"
            for name, (value, low, high) in limits.items()
            if not low <= value <= high
        ]
        if problems:
            raise InputError(problems)
        self.out_dim, self.window, self.threshold, self.most = dim, window, threshold, most

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        """Merge. A merged token has the size-weighted mean of the centres and the area of all its squares together.

        Tokens come in the order of their places, whatever the order of the patches was.
        """
        if budget < 1:
            raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
        return Tokens.from_rows([torch.from_numpy(self._merge(rows.numpy(), budget)) for rows in tokens.rows()])

    def _merge(self, rows: np.ndarray, budget: int) -> np.ndarray:
        """Rows (n, d + 4) of a slide to fewer."""
        x, y, side, size = rows[:, self.out_dim :].T
        # Equal places are told apart by their features, so that every order of the patches gives the same rows.
        rows = rows[np.lexsort([rows[:, : self.out_dim].sum(1), size, side, x, y])]
        corner = rows[:, -PLACE - 1 : -2].min(0) - np.median(side) / 2
        extent = float(np.ptp(rows[:, -PLACE - 1 : -2], axis=0).max() + np.median(side))
        width, first = float(np.median(side)) * self.window, True
        while first or len(rows) > budget:
            last = width >= extent
            wider = _windows(rows, corner, width * 2)
            crowd = budget if last else max(budget, CROWD * (wider.max() + 1))
            rows = self._within(rows, corner, width, 1 if first else budget, crowd)
            width, first = width * 2, False
        return rows

    def _within(self, rows: np.ndarray, corner: np.ndarray, width: float, fewest: int, crowd: int) -> np.ndarray:
        """Merge within windows of one width: above the threshold to `fewest` tokens, below it to `crowd`."""
        while len(rows) > fewest:
            pairs, alike = _most_alike(rows[:, : self.out_dim], _windows(rows, corner, width))
            if not len(alike):
                break
            threshold, left = self.threshold, fewest
            if alike[0] <= threshold:
                threshold, left = alike[0] - FALL, max(fewest, crowd)
            take = min(int((alike > threshold).sum()), len(rows) - left)
            if take <= 0:
                break
            rows = _join(rows, pairs[:take])
        return rows


def _windows(rows: np.ndarray, corner: np.ndarray, width: float) -> np.ndarray:
    """Number of the window (n,) in which each token's centre lies, from 0 without gaps."""
    at = np.floor((rows[:, -PLACE - 1 : -2] - corner) / width).astype(np.int64)
    return np.unique(at[:, 1] * (at[:, 0].max() + 1) + at[:, 0], return_inverse=True)[1]


def _most_alike(features: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each token with the one of its window most like it.

    Returns:
        Pairs (m, 2) and their cosine similarities (m,), the most alike first, each pair once.
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    order = np.argsort(windows, kind="stable")
    count = np.bincount(windows)
    start = np.cumsum(count) - count
    best, alike = np.full(len(unit), -1), np.full(len(unit), -np.inf, np.float32)
    for crowd in np.unique(count[count > 1]):  # windows of one occupancy at once
        members = order[start[count == crowd][:, None] + np.arange(crowd)]
        here = unit[members]
        similar = here @ here.transpose(0, 2, 1)
        similar[:, np.arange(crowd), np.arange(crowd)] = -np.inf
        nearest = similar.argmax(2)
        best[members] = np.take_along_axis(members, nearest, 1)
        alike[members] = np.take_along_axis(similar, nearest[..., None], 2)[..., 0]
    own = np.flatnonzero(best >= 0)
    pairs, at = np.unique(np.sort(np.stack([own, best[own]], 1), 1), axis=0, return_index=True)
    falling = np.argsort(-alike[own][at], kind="stable")
    return pairs[falling], alike[own][at][falling]


def _join(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Rows with the tokens that pairs connect made one."""
    n = len(rows)
    _, group = connected_components(coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (n, n)), False)
    size, side = rows[:, -1], rows[:, -2]
    total = np.bincount(group, weights=size)
    mean = csr_array((size / total[group], (group, np.arange(n))))
    area = np.bincount(group, weights=side.astype(np.float64) ** 2)
    return np.concatenate([mean @ rows[:, :-2], np.sqrt(area)[:, None], total[:, None]], 1).astype(rows.dtype)
