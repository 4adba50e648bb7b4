"""Base of all compressors: tokens in, fewer tokens out.

A compressor without parameters runs once a slide, outside the model; one with parameters runs within it and is
trained with it. They stand one after another in a recipe (`frugalpath.models.compressors.chain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

PLACE = 3
"""Columns of a token's place: centre x, centre y and side of its square."""

WAVES = (1, 2, 4)
"""Half periods across the slide of the sines and cosines that describe a place."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of B slides, right-padded to n.

    Args:
        features: (B, n, w).
        place: (B, n, 3) centre x, centre y and side: in pixels of level 0 for compressors without parameters, as
            shares of the slide for learned ones. A latent's is the whole slide (0.5, 0.5, 1).
        size: (B, n) patches that a token stands for; 0 is padding.
    """

    features: torch.Tensor
    place: torch.Tensor
    size: torch.Tensor

    @classmethod
    def from_rows(cls, rows: Sequence[torch.Tensor]) -> Tokens:
        """From B slides' rows, each (n_i, w + 4): features, place, size."""
        padded = pad_sequence(list(rows), batch_first=True)
        return cls(padded[..., : -PLACE - 1], padded[..., -PLACE - 1 : -1], padded[..., -1])

    def rows(self) -> list[torch.Tensor]:
        """The tokens of each slide without padding, as rows (n_i, w + 4)."""
        whole = torch.cat([self.features, self.place.to(self.features), self.size.to(self.features)[..., None]], -1)
        return [slide[size > 0] for slide, size in zip(whole, self.size, strict=True)]

    @property
    def bias(self) -> torch.Tensor:
        """What is added to the scores of attention to these tokens, (B, 1, 1, n).

        The logarithm of the size: a token that stands for k patches draws the attention of k (ToMe, Bolya et al.
        2023, section 3). Padding draws none.
        """
        lowest = torch.finfo(self.features.dtype).min
        weight = self.size.to(self.features.dtype)
        return weight.clamp_min(1e-9).log().masked_fill(weight <= 0, lowest)[:, None, None, :]


class Compressor(nn.Module):
    """`Tokens` to at most `budget` tokens a slide.

    Args:
        dim: width w of the tokens that come in.
    """

    learned: ClassVar[bool] = True
    """Whether it has parameters, and so runs within the model."""

    asks: ClassVar[bool] = False
    """Whether it reads the question."""

    out_dim: int
    """Width of the tokens that go out."""

    most: int
    """Tokens it gives at most, and gives where another compressor follows. Only of learned ones."""

    def count(self, n: int, budget: int) -> int:
        """Tokens that come of n at a budget. Only of learned ones; the others are run to see."""
        return min(budget, self.most)

    def room(self, n: int) -> int:
        """Tokens that come of n at most, whatever the budget. Only of those without parameters."""
        return n

    def flops(self, n: int, budget: int) -> float:
        """FLOPs of one slide of n tokens (a multiply-add counts 2)."""
        return 0.0

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        """Compress.

        Args:
            budget: tokens a slide, at least 1.
            question: (B, hidden) mean embedding of the question, for those that read it.
        """
        raise NotImplementedError


class PatchEmbedding(nn.Module):
    """Patch features and their places as embeddings: (..., d) and (..., 3) -> (..., width).

    Features are standardised (`standardise`), then LayerNorm and a linear layer. Place scales the result as well as
    shifting it (FiLM, Perez et al. 2018, section 2.1), so that a mean over tokens already says where something lies.
    """

    def __init__(self, dim: int, width: int, dropout: float = 0.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.features = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, width))
        self.place = nn.Linear(PLACE * (1 + 2 * len(WAVES)), 2 * width)

    def forward(self, features: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        place = place.to(self.place.weight.dtype)
        waves = [wave(k * torch.pi * place) for k in WAVES for wave in (torch.sin, torch.cos)]
        scale, shift = self.place(torch.cat([place, *waves], -1)).chunk(2, -1)
        features = (features.to(self.mean.dtype) - self.mean) / self.std
        return self.features(features) * (1 + scale) + shift

    @torch.no_grad()
    def standardise(self, features: torch.Tensor) -> None:
        """Set mean and deviation from the features (n, d) of training slides."""
        self.mean.copy_(features.float().mean(0))
        self.std.copy_(features.float().std(0).clamp_min(1e-3))

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values of what a model's own initialisation does not know."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)
        # A few place columns stand beside hundreds of feature columns: equal say at the start.
        nn.init.normal_(self.place.weight, std=0.2)


def linear_flops(module: nn.Module, tokens: float) -> float:
    """FLOPs of all matrices of a module applied to `tokens` tokens."""
    return 2.0 * tokens * sum(p.numel() for p in module.parameters() if p.ndim == 2)
