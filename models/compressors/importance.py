"""Token importance scorer: the tokens that matter to a question.

A reconstruction: LoC-Path (Hu et al. 2025, arXiv 2512.05391) states that the latents most relevant to the query are
kept, 96 of 128; how they are scored and how the scorer learns is not known.
"""

from __future__ import annotations

import torch
from torch import nn

from frugalpath.models.compressors.base import Compressor, Tokens, linear_flops


class ImportanceScorer(Compressor):
    """Keeps the tokens of the highest scores, a_j = MLP([z_j ; question]), in the order they came in.

    Kept tokens go out as they came; only their gradient knows the scores: they are treated as if the mean of all the
    slide's tokens, weighted by the softmax of the scores, were added to each (straight-through). So the score of a
    token that was dropped rises too where its content would have lowered the loss. Weighting kept tokens by their own
    scores would tell the scorer nothing about the others, and nothing at all where a layer norm that undoes every
    scale reads them next.

    Args:
        dim: width of the tokens. hidden: width of the question. most: tokens kept at most. width: of the MLP.
    """

    asks = True

    def __init__(self, dim: int, hidden: int, most: int = 96, width: int = 128):
        super().__init__()
        self.out_dim, self.most = dim, most
        # The first layer of an MLP over [token ; question], without the question repeated for each token.
        self.token = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.question = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width, bias=False))
        self.score = nn.Sequential(nn.GELU(), nn.Linear(width, 1))

    def count(self, n: int, budget: int) -> int:
        return min(budget, self.most, n)

    def flops(self, n: int, budget: int) -> float:
        return linear_flops(self.token, n) + linear_flops(self.question, 1) + linear_flops(self.score, n)

    def scores(self, tokens: Tokens, question: torch.Tensor | None) -> torch.Tensor:
        """Importance (B, n) of each token; without a question, of the token alone."""
        seen = self.token(tokens.features)
        if question is not None:
            seen = seen + self.question(question.to(seen.dtype))[:, None]
        return self.score(seen)[..., 0]

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        if budget < 1:
            raise ValueError(f"a budget of {budget} tokens: at least 1 is needed")
        here = tokens.size > 0
        scores = self.scores(tokens, question)
        ranked = scores.masked_fill(~here, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        kept = ranked[:, : self.count(scores.shape[1], budget)].sort(dim=1).values
        features, place = (_at(part, kept) for part in (tokens.features, tokens.place))
        share = scores.masked_fill(~here, torch.finfo(scores.dtype).min).softmax(1)
        features = features + (share - share.detach())[:, None] @ tokens.features.detach()
        return Tokens(features, place, tokens.size.gather(1, kept))


def _at(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Rows (B, k, w) of values (B, n, w) at indices (B, k)."""
    return values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1]))
