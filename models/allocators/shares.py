"""What share of a budget each slide of a case gets."""

from __future__ import annotations

import torch
from torch import nn

SHARES = ("equal", "attention", "split")


class SlideShares(nn.Module):
    """Attention over slides (Ilse et al. 2018, section 2.4).

    The same attention gathers the slides for the predicted score, and is learned with it: a slide that says more about
    how well the case will be answered gets more.

    Args:
        feature_dim: width d of the patch features. width: hidden width. buckets: of hashed question tokens.
    """

    def __init__(self, feature_dim: int, width: int, buckets: int):
        super().__init__()
        self.see = nn.Sequential(nn.LayerNorm(feature_dim), nn.Linear(feature_dim, width))
        self.question = nn.EmbeddingBag(buckets, width, mode="mean", padding_idx=0)
        self.score = nn.Parameter(torch.zeros(width))

    def forward(self, look: torch.Tensor, question: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Shares (B, K) that sum to 1, of looks (B, K, tokens, d); 0 for slides that are not there."""
        asked = self.question(question)[:, None]
        scores = torch.tanh(self.see(look.mean(2)) + asked) @ self.score
        return scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(1)

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values: equal shares."""
        nn.init.zeros_(self.score)


def there(look: torch.Tensor) -> torch.Tensor:
    """Which slides (B, K) a case has; the looks at others are nought."""
    return look.flatten(2).any(-1)


def equal(there: torch.Tensor) -> torch.Tensor:
    """The same share for every slide that is there, (B, K)."""
    return there / there.sum(1, keepdim=True).clamp_min(1)
