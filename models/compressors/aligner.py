"""From tokens to embeddings of the language model, and what tells the slides of a case apart (PathoSynVLM)."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Compressor, PatchEmbedding, Tokens

logger = logging.getLogger(__name__)

ALIGNERS = ("place", "mlp", "linear")
MARKERS = ("none", "shared", "unique")
MARKER_STD = 0.02
"""Deviation of a marker's initial values (PathoSynVLM, methods 3.1)."""


class Keep(Compressor):
    """All patches up to the budget; of more, ones evenly spaced over the slide (PathoSynVLM: all 5x patches to a cap).

    The patches are walked along a Morton curve, on which neighbours on the slide are near each other.

    Args:
        dim: width of the features. most: tokens where another compressor follows.
    """

    learned = False

    def __init__(self, dim: int, most: int = 4096):
        super().__init__()
        self.out_dim, self.most = dim, most
        self._told = False

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        rows = []
        for slide in tokens.rows():
            if len(slide) > budget and not self._told:
                logger.info("a slide has %d patches: %d evenly spaced ones are kept", len(slide), budget)
                self._told = True
            rows.append(slide[_evenly(slide[:, self.out_dim :].numpy(), budget)])
        return Tokens.from_rows(rows)


def _evenly(places: np.ndarray, budget: int) -> np.ndarray:
    """Indices, ascending, of `budget` of the squares (n, 3+), evenly spaced along a Morton curve; all where few."""
    n = len(places)
    if n <= budget:
        return np.arange(n)
    cell = np.maximum(places[:, 2].min(), 1e-9)
    steps = np.floor((places[:, :2] - places[:, :2].min(0)) / cell).astype(np.uint64)
    code = np.zeros(n, dtype=np.uint64)
    for bit in range(24):
        for axis in (0, 1):
            code |= ((steps[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(2 * bit + axis)
    walk = np.argsort(code, kind="stable")
    return np.sort(walk[((np.arange(budget) + 0.5) * n / budget).astype(np.int64)])


class PlaceAligner(nn.Module):
    """Tokens with their places as embeddings: `PatchEmbedding`, GELU, linear, LayerNorm."""

    def __init__(self, dim: int, hidden: int, width: int, dropout: float):
        super().__init__()
        self.patches = PatchEmbedding(dim, width, dropout)
        self.out = nn.Sequential(nn.GELU(), nn.Dropout(dropout), nn.Linear(width, hidden), nn.LayerNorm(hidden))

    def forward(self, features: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.out(self.patches(features, place))


class FeatureAligner(nn.Module):
    """Tokens as embeddings by their features alone.

    Args:
        kind: `mlp`: LayerNorm, linear to 4 H, GELU, dropout, linear to H, LayerNorm (PathoSynVLM's VisionAligner,
            methods 3.1); `linear`: one linear layer (BLIP-2's projection to the language model, methods 4.2).
    """

    def __init__(self, kind: str, dim: int, hidden: int, dropout: float):
        super().__init__()
        if kind == "linear":
            self.out = nn.Sequential(nn.Linear(dim, hidden))
        else:
            self.out = nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, 4 * hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(4 * hidden, hidden),
                nn.LayerNorm(hidden),
            )

    def forward(self, features: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return self.out(features.to(self.out[0].weight.dtype))


def make_aligner(kind: str, dim: int, hidden: int, width: int, dropout: float) -> PlaceAligner | FeatureAligner:
    """An aligner of one of `ALIGNERS`: features (..., dim) and places (..., 3) -> (..., hidden).

    Raises:
        InputError: an unknown kind.
    """
    if kind not in ALIGNERS:
        raise InputError(f"performer.aligner: {kind!r} is unknown; use one of {', '.join(ALIGNERS)}")
    if kind == "place":
        return PlaceAligner(dim, hidden, width, dropout)
    return FeatureAligner(kind, dim, hidden, dropout)


class Markers(nn.Module):
    """A learned embedding of each slide of a case (PathoSynVLM, methods 3.1).

    Args:
        unique: the k-th slide of a case has one of its own; otherwise all share one.
        slides: slides a case may have.
        std: of the initial values.
    """

    def __init__(self, hidden: int, unique: bool, slides: int = 32, std: float = MARKER_STD):
        super().__init__()
        self.separator = nn.Parameter(torch.empty(hidden))
        self.index = nn.Embedding(slides, hidden) if unique else None
        self.slides, self.std = slides, std
        self.reset()

    def forward(self, slide: torch.Tensor) -> torch.Tensor:
        """Markers (V, hidden) of the slides numbered `slide` (V,) from 0."""
        if self.index is None:
            return self.separator.expand(len(slide), -1)
        return self.separator + self.index(slide)

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values."""
        nn.init.normal_(self.separator, std=self.std)
        if self.index is not None:
            nn.init.normal_(self.index.weight, std=self.std)
