"""Policy gradient from drawn budgets, where there is no score table."""

from __future__ import annotations

import torch

ADVANTAGES = ("rloo", "grpo")


def advantages(reward: torch.Tensor, kind: str = "rloo", weight: torch.Tensor | None = None) -> torch.Tensor:
    """Advantages (B, M) of the M draws of each case within the case.

    Args:
        reward: (B, M), M >= 2.
        kind: `rloo`: less the mean reward of the other draws, which leaves the gradient unbiased (Kool et al. 2019;
            Ahmadian et al. 2024). `grpo`: less the mean of all, over their standard deviation (Shao et al. 2024):
            biased, every case then counts the same however much is at stake.
        weight: importance (B, M) of the draws, where they come from another policy.
    """
    if kind == "grpo":
        return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)
    counted = reward if weight is None else weight * reward
    return reward - (counted.sum(-1, keepdim=True) - counted) / (reward.shape[-1] - 1)


def sampled_loss(
    logits: torch.Tensor,
    rungs: torch.Tensor,
    reward: torch.Tensor,
    kind: str = "rloo",
    entropy: float = 0.0,
    behaviour: torch.Tensor | None = None,
) -> torch.Tensor:
    """A loss whose gradient is, with `rloo`, in the mean that of minus the expected reward.

    Args:
        logits: (B, rungs). rungs: (B, M), drawn independently. reward: (B, M).
        entropy: reward for a nat of entropy, whose gradient is exact.
        behaviour: probabilities (B, rungs) that the rungs were drawn by, where not by those of the logits.
    """
    logs = logits.log_softmax(-1)
    drawn = logs.gather(1, rungs)
    weight = torch.ones_like(drawn) if behaviour is None else drawn.detach().exp() / behaviour.gather(1, rungs)
    gain = weight * advantages(reward, kind, weight).to(logs.dtype) * drawn
    return -gain.mean() + entropy * (logs.exp() * logs).sum(-1).mean()
