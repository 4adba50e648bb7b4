"""BLIP-2's Q-Former over the patches of a slide, as PathAlign bridges slides and text (methods 4.1).

The paper states the bridge and its number of patches (10,240). 32 queries of width 768 and cross-attention in every
second block are BLIP-2's own (Li et al. 2023, section 3.1); that PathAlign has them is inferred (methods 4.2).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Compressor, PatchEmbedding, Tokens, linear_flops

logger = logging.getLogger(__name__)

CROSS_EVERY = 2
"""Blocks from one cross-attention to the next."""


class QFormer(Compressor):
    """Learned queries that read the patches: at most `queries` tokens, of however many patches.

    A smaller budget keeps the first queries. Each token is about the whole slide: place (0.5, 0.5, 1), size 1.

    Args:
        dim: width of the patch features.
        queries: learned queries, the most tokens that it gives.
        width: of the queries, of the embedded patches and of the tokens that go out.
        layers, heads: of the transformer; its feed-forward layers are 4 times as wide.
        dropout: within the transformer, and on the standardised patch features.
        patches: of more patches than that, so many, evenly spaced in the order given, are read.

    Raises:
        InputError: the heads do not divide the width, or a count is below 1.
    """

    reads_text: ClassVar[bool] = False
    """Whether the transformer has feed-forward layers for text too (`frugalpath.models.slide_text`)."""

    def __init__(
        self,
        dim: int,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
        patches: int = 10240,
    ):
        super().__init__()
        counts = {"queries": queries, "width": width, "layers": layers, "heads": heads, "patches": patches}
        problems = [f"qformer: {name} is {count}; give at least 1" for name, count in counts.items() if count < 1]
        if not problems and width % heads:
            problems = [f"qformer: {heads} heads do not divide a width of {width}; choose others"]
        if problems:
            raise InputError(problems)
        self.out_dim, self.most, self.patches = width, queries, patches
        self.embed = PatchEmbedding(dim, width, dropout)
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.transformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                # 0.02 at BERT's width, and the same scale of outputs at smaller ones.
                initializer_range=0.02 * (768 / width) ** 0.5,
                cross_attention_frequency=CROSS_EVERY,
                encoder_hidden_size=width,
                use_qformer_text_input=self.reads_text,
            )
        )
        self._warned = False
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values of the queries, which a model's own initialisation does not know."""
        nn.init.normal_(self.queries, std=0.02)

    def flops(self, n: int, budget: int) -> float:
        n, q, d = min(n, self.patches), self.count(n, budget), self.out_dim
        layers = self.transformer.config.num_hidden_layers
        # Projections of the queries and their attention to each other, then the feed-forward layer.
        block = 2.0 * 4 * d * d * q + 4.0 * q * q * d + 2.0 * 8 * d * d * q
        cross = 2.0 * 2 * d * d * (q + n) + 4.0 * q * n * d
        return linear_flops(self.embed, n) + layers * block + -(-layers // CROSS_EVERY) * cross

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        out = self.read(*self.see(tokens), budget)
        place = out.new_tensor([0.5, 0.5, 1.0]).expand(*out.shape[:2], -1)
        return Tokens(out, place, out.new_ones(out.shape[:2]))

    def see(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedded patches (B, n, width) and what is added to the scores of attention to them (B, 1, 1, n)."""
        tokens = self._cut(tokens)
        patches = self.embed(tokens.features, tokens.place)
        return patches, replace(tokens, features=patches).bias

    def read(
        self,
        patches: torch.Tensor,
        bias: torch.Tensor,
        budget: int,
        text: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the transformer on the first `budget` queries and, if given, a text after them.

        Args:
            patches, bias: of `see`.
            text: (B, t, width) embeddings, of a model that reads text.
            mask: (B, 1, q + t, q + t) added to the scores of queries and text among each other.

        Returns:
            (B, q + t, width).
        """
        queries = self.queries[:budget].expand(len(patches), -1, -1)
        q = queries.shape[1]
        out = self.transformer(
            queries if text is None else torch.cat([queries, text], 1),
            query_length=q,
            attention_mask=mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=bias.expand(-1, 1, q, -1),
        )
        return out.last_hidden_state

    def _cut(self, tokens: Tokens) -> Tokens:
        if tokens.size.shape[1] <= self.patches:
            return tokens
        rows = tokens.rows()
        longest = max(map(len, rows))
        if longest > self.patches and not self._warned:
            logger.warning(
                "a slide of %d patches: the Q-Former reads %d of them, evenly spaced", longest, self.patches
            )
            self._warned = True
        at = torch.arange(self.patches, device=tokens.size.device)
        return Tokens.from_rows([r if len(r) <= self.patches else r[at * len(r) // self.patches] for r in rows])
