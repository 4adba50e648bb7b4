"""What a performer sees of one field of view or slide: at most `budget` visual tokens and where they lie."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch

from models.compressors.pool import pool
from slides.store import Features, read_features

PLACE = 3
"""Columns that follow the features of a visual token: centre x, centre y, side of its square, all in 0..1."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens of one image or slide.

    Args:
        rows: (n, d + 3) float32; d feature columns, then centre x, centre y and side as shares of the field.
        budget: tokens that were asked for; n is the realised count.
        source: path of the image or slide.
    """

    rows: torch.Tensor
    budget: int
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def __deepcopy__(self, memo: dict) -> VisualTokens:
        # Trainers deep-copy whole prompts; the tensor is never written to, so one copy serves all completions.
        return self


class FeatureBank:
    """Stored features of the cases' images and slides, pooled to a budget; every (source, budget) is made once.

    Args:
        files: feature file (HDF5) of each image or slide path.
        cache_mb: memory for pooled tokens, in MiB; the least recently used go first.
    """

    def __init__(self, files: dict[str, str], cache_mb: int = 2048):
        self.files = files
        self.cache_bytes = cache_mb * 2**20
        self._pooled: OrderedDict[tuple[str, int], VisualTokens] = OrderedDict()
        self._held = 0

    @property
    def dim(self) -> int:
        """Width d of the stored features."""
        return self.load(next(iter(self.files))).features.shape[1]

    def load(self, source: str) -> Features:
        """All stored features of a source, from its file."""
        return read_features(self.files[source])

    def see(self, source: str, budget: int) -> VisualTokens:
        """Visual tokens of a source at a budget (at least 1)."""
        key = (source, budget)
        if key in self._pooled:
            self._pooled.move_to_end(key)
            return self._pooled[key]
        self.see_all(source, [budget])
        return self._pooled[key]

    def see_all(self, source: str, budgets: list[int]) -> list[VisualTokens]:
        """Visual tokens of a source at several budgets; its file is read once."""
        missing = [b for b in budgets if (source, b) not in self._pooled]
        if missing:
            stored = self.load(source)
            features = stored.features
            squares, shares = cells(stored), extent(stored)
            for budget in missing:
                tokens, places = pool(features, squares, budget)
                rows = np.concatenate([tokens, places / shares], axis=1, dtype=np.float32)
                self._keep(VisualTokens(torch.from_numpy(rows), budget, source))
        return [self._pooled[source, b] for b in budgets]

    def _keep(self, tokens: VisualTokens) -> None:
        self._pooled[tokens.source, tokens.budget] = tokens
        self._held += tokens.rows.nbytes
        while self._held > self.cache_bytes and len(self._pooled) > 16:
            _, old = self._pooled.popitem(last=False)
            self._held -= old.rows.nbytes


def cells(stored: Features) -> np.ndarray:
    """Squares of the stored features as (N, 3): centre x, centre y and side, in level-0 pixels."""
    size = float(stored.attrs["patch_size"])
    centre = stored.coords.astype(np.float64) + size / 2
    return np.concatenate([centre, np.full((len(centre), 1), size)], axis=1)


def extent(stored: Features) -> np.ndarray:
    """What centres and sides are divided by to give shares of the field: width, height and the longer of them."""
    # Files of other toolkits may not state the slide's size; the patches' own extent stands in for it.
    end = stored.coords.max(0) + float(stored.attrs["patch_size"])
    width = float(stored.attrs.get("width", end[0]))
    height = float(stored.attrs.get("height", end[1]))
    return np.array([width, height, max(width, height)])
