"""Masked feature reconstruction: what a resampler is pre-trained on, with a decoder that is dropped afterwards.

A reconstruction of LoC-Path's stage 0 (Hu et al. 2025, arXiv 2512.05391), which states the task and the decoder's end
alone; the scheme is that of masked autoencoders (He et al. 2022, arXiv 2111.06377).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from frugalpath.models.compressors.base import PLACE, Tokens
from frugalpath.models.compressors.resampler import Resampler

FREQUENCIES = tuple(2.0**k for k in range(7))
"""Half periods across the slide of a query's sines and cosines; the finest spans 1/32 of it."""

LEAST = 0.1
"""Least deviation that a feature is divided by in the loss, of the mean deviation."""


class FeatureDecoder(nn.Module):
    """Features of the tokens at given places, from a resampler's latents.

    Args:
        latent: width of the latents. dim: width of the features. width: of the queries, a multiple of `heads`.
    """

    def __init__(self, latent: int, dim: int, width: int = 256, layers: int = 2, heads: int = 4):
        super().__init__()
        self.place = nn.Sequential(
            nn.Linear(PLACE * (1 + 2 * len(FREQUENCIES)), width), nn.GELU(), nn.Linear(width, width)
        )
        self.latents = nn.Sequential(nn.Linear(latent, width), nn.LayerNorm(width))
        self.read = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        self.asks = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, latents: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """Latents (B, m, latent) and places (B, n, 3) to features (B, n, dim)."""
        place = place.to(latents.dtype)
        waves = [wave(k * torch.pi * place) for k in FREQUENCIES for wave in (torch.sin, torch.cos)]
        x, seen = self.place(torch.cat([place, *waves], -1)), self.latents(latents)
        for ask, read, feed in zip(self.asks, self.read, self.feed, strict=True):
            x = x + read(ask(x), seen, seen, need_weights=False)[0]
            x = x + feed(x)
        return self.out(x)


class MaskedReconstruction(nn.Module):
    """A resampler and its decoder: a share of a slide's tokens is hidden, the others must tell their features.

    Args:
        resampler: trained in place; its `patches` are standardised already.
        share: of the tokens that are hidden.
        ladder: numbers of latents, drawn anew for each batch, so that the first ones do most.
        width: of the decoder.
    """

    def __init__(self, resampler: Resampler, share: float, ladder: Sequence[int], width: int = 256):
        super().__init__()
        self.resampler, self.share, self.ladder = resampler, share, list(ladder)
        self.decoder = FeatureDecoder(resampler.out_dim, len(resampler.patches.mean), width)

    def forward(self, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss at a drawn number of latents: mean squared error of hidden tokens' standardised features.

        Masks and budgets come of torch's generator, whose state checkpoints keep. Tokens count by their size.

        Args:
            rows: B slides' tokens, each (n, d + 4): features, place as shares of the slide, size. A slide of one
                token has nothing to hide and teaches nothing.
        """
        budget = self.ladder[int(torch.randint(len(self.ladder), ()))]
        predicted, target, weight, _ = self.reconstruct(rows, budget)
        return {"loss": _mean((predicted - target) ** 2, weight)}

    def reconstruct(self, rows: list[torch.Tensor], budget: int) -> tuple[torch.Tensor, ...]:
        """Hide tokens and tell them.

        Returns:
            Predicted and true features (B, n, d), standardised, weights (B, n), 0 for padding, and the mean of each
            slide's visible tokens (B, 1, d).
        """
        visible, hidden = [], []
        for slide in rows:
            order = torch.randperm(len(slide)).to(slide.device)
            seen = max(1, round(len(slide) * (1 - self.share)))
            visible.append(slide[order[:seen]])
            hidden.append(slide[order[seen:]])
        given, asked = Tokens.from_rows(visible), Tokens.from_rows(hidden)
        latents = self.resampler(given, budget).features
        mean, std = self.resampler.patches.mean, self.resampler.patches.std
        # Else a feature that hardly varied in training would outweigh all others where it does.
        std = std.clamp_min(float(LEAST * std.mean()))
        known = (given.size[:, None] @ given.features) / given.size.sum(1)[:, None, None]
        target = (asked.features - mean) / std
        return self.decoder(latents, asked.place), target, asked.size, (known - mean) / std


def _mean(error: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean of errors (B, n, d) over tokens and features."""
    return (error.mean(-1) * weight).sum() / weight.sum().clamp_min(1)
