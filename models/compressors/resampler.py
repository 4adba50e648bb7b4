"""Perceiver resampler: a fixed number of learned latents read any number of tokens.

A reconstruction: LoC-Path (Hu et al. 2025, arXiv 2512.05391) states 128 latents, pre-trained by masked feature
reconstruction (`sft.mae`); its layers are not known. Here they are those of Idefics2's resampler.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverLayer, Idefics2RMSNorm

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Compressor, PatchEmbedding, Tokens, linear_flops

LATENT_STD = 0.02
"""Deviation of the latents' initial values; layers normalise what they read."""


class Resampler(Compressor):
    """Latents through layers of cross-attention to [tokens, latents] and a gated feed-forward network.

    A budget is the number of latents used, always the first ones: trained at changing budgets, they are nested. A
    token that stands for k patches draws the attention of k. What comes out belongs to no place: each latent is the
    whole slide's, of size 1.

    Args:
        dim: width of the tokens. latents: how many there are. width: of the latents, a multiple of `heads`.
        layers: of cross-attention. heads: of each.
    """

    def __init__(self, dim: int, latents: int = 128, width: int = 512, layers: int = 2, heads: int = 8):
        super().__init__()
        if min(latents, width, layers, heads) < 1 or width % heads:
            raise InputError(
                f"performer.compressors: resampler: latents {latents}, width {width}, layers {layers}, heads {heads}: "
                "all must be at least 1, and width a multiple of heads"
            )
        config = Idefics2PerceiverConfig(
            hidden_size=width,
            resampler_n_latents=latents,
            resampler_depth=layers,
            resampler_n_heads=heads,
            resampler_head_dim=width // heads,
            num_key_value_heads=heads,
        )
        config._attn_implementation = "sdpa"
        self.out_dim, self.most = width, latents
        self.patches = PatchEmbedding(dim, width)
        self.latents = nn.Parameter(torch.empty(latents, width))
        self.layers = nn.ModuleList(Idefics2PerceiverLayer(config, layer) for layer in range(layers))
        self.norm = Idefics2RMSNorm(width)
        self.patches.reset()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values of what a model's own initialisation does not know, less those of `patches`."""
        nn.init.normal_(self.latents, std=LATENT_STD)

    def flops(self, n: int, budget: int) -> float:
        m, width = self.count(n, budget), self.out_dim
        read = 2 * (n + m) * 2 * width**2 + 2 * m * 2 * width**2 + 4 * m * (n + m) * width
        feed = 2 * m * 3 * 4 * width**2
        return linear_flops(self.patches, n) + len(self.layers) * (read + feed)

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        if budget < 1:
            raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
        slides = len(tokens.size)
        context = self.patches(tokens.features, tokens.place)
        latents = self.latents[:budget].expand(slides, -1, -1)
        # Latents see each other as single tokens, so that a slide of padding alone still has something to attend to.
        own = tokens.bias.new_zeros(slides, 1, 1, latents.shape[1])
        bias = torch.cat([tokens.bias, own], -1).to(context.dtype).expand(-1, -1, latents.shape[1], -1)
        for layer in self.layers:
            latents = layer(latents, context, attention_mask=bias)
        place = tokens.place.new_tensor([0.5, 0.5, 1.0]).expand(*latents.shape[:2], -1)
        return Tokens(self.norm(latents), place, tokens.size.new_ones(latents.shape[:2]))
