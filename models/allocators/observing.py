"""The cheapest look as one row of numbers a case, for learners that are not ours."""

from __future__ import annotations

import numpy as np
import torch

from models.allocators.network import there


def observations(look: torch.Tensor, question: torch.Tensor, buckets: int = 64) -> np.ndarray:
    """Pooled look and hashed bag of question tokens, (N, d + buckets) in float32; see `envs.token_budget`.

    Args:
        look: (N, K, tokens, d), as `CheapLook` gives it: the mean over tokens and the slides that are there.
        question: (N, T) hashed tokens, 0 is none: shares of the tokens in each bucket.
    """
    seen = there(look)[..., None, None]
    pooled = (look * seen).sum((1, 2)) / (seen.sum(1)[:, 0] * look.shape[2]).clamp_min(1)
    asked = torch.zeros(len(question), buckets)
    some = (question > 0).float()
    asked.scatter_add_(1, question % buckets, some / some.sum(1, keepdim=True).clamp_min(1))
    return torch.cat([pooled, asked], 1).numpy().astype(np.float32)
