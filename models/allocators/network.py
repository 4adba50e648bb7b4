"""The small network behind an allocator: it reads the cheapest look and the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slides.errors import InputError, removed

Network = TypeVar("Network", bound="LookNetwork")


@dataclass(frozen=True)
class Look:
    """Looks at B cases with what the performer made of them; indexed like a tensor.

    Args:
        tokens: (B, K, n, d), see `CheapLook`. state: (B, E).
    """

    tokens: torch.Tensor
    state: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, cases: torch.Tensor | slice) -> Look:
        return Look(self.tokens[cases], self.state[cases])


class AllocatorConfig(PreTrainedConfig):
    """Configuration of every allocator that is a small network.

    Args:
        ladder: budgets in tokens, ascending.
        look: the budgets whose pooled tokens make up the cheapest look.
        feature_dim: width d of the patch features.
        width: hidden width; buckets: size of the hashed vocabulary of question tokens.
        dropout: before the hidden layer; look_dropout: of the standardised features of the look.
        look_state, look_confidence: budget at which the performer is asked for its hidden state, and for how sure it
            is, see `models.allocators.glance`; None does not ask. state_dim: numbers that this gives.
    """

    model_type = "frugalpath_allocator"

    def __init__(
        self,
        ladder: Sequence[int] = (1, 4, 16, 49, 196),
        look: Sequence[int] = (1, 4),
        feature_dim: int = 1280,
        width: int = 64,
        buckets: int = 4096,
        dropout: float = 0.3,
        look_dropout: float = 0.5,
        look_state: int | None = None,
        look_confidence: int | None = None,
        state_dim: int = 0,
        **kwargs: Any,
    ):
        if (share := kwargs.pop("share", "equal")) != "equal":
            made = f"the saved allocator has share {share!r}, which"
            raise InputError(removed(made, "train again without it, in a new folder"))
        self.ladder, self.look = list(ladder), list(look)
        self.feature_dim, self.width, self.buckets = feature_dim, width, buckets
        self.dropout, self.look_dropout = dropout, look_dropout
        self.look_state, self.look_confidence, self.state_dim = look_state, look_confidence, state_dim
        super().__init__(**kwargs)


class Beside(nn.Module):
    """What the performer's own state (B, E) adds to the outputs (B, rungs); nothing at first."""

    def __init__(self, config: AllocatorConfig):
        super().__init__()
        self.register_buffer("mean", torch.zeros(config.state_dim))
        self.register_buffer("std", torch.ones(config.state_dim))
        self.layers = nn.Sequential(
            nn.Linear(config.state_dim, config.width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, len(config.ladder)),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.layers((state - self.mean) / self.std)

    @torch.no_grad()
    def reset(self) -> None:
        """Initial values: an allocator that is widened by it decides as it did."""
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)


class LookNetwork(PreTrainedModel):
    """Reads look (B, K, sum(look), d) and question (B, T), and writes one output a rung.

    A look may bring the performer's own state (``Look`) where the configuration asks for it.

    Args:
        config: its shape. extra: further inputs of the head, (B, extra).
    """

    config_class: type[AllocatorConfig] = AllocatorConfig

    def __init__(self, config: AllocatorConfig, extra: int = 0):
        super().__init__(config)
        inputs = sum(config.look) * (config.width // 4) + config.width + extra
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("std", torch.ones(config.feature_dim))
        self.drop = nn.Dropout(config.look_dropout)
        self.see = nn.Linear(config.feature_dim, config.width // 4)
        self.question = nn.EmbeddingBag(config.buckets, config.width, mode="mean", padding_idx=0)
        self.beside = Beside(config) if config.state_dim else None
        self.head = nn.Sequential(
            nn.LayerNorm(inputs),
            nn.Dropout(config.dropout),
            nn.Linear(inputs, config.width),
            nn.GELU(),
            nn.Linear(config.width, len(config.ladder)),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Beside):
            module.reset()

    def read(self, look: torch.Tensor | Look, question: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        """Outputs (B, rungs)."""
        if isinstance(look, Look):
            assert self.beside is not None
            return self.read(look.tokens, question, *extra) + self.beside(look.state)
        return self.head(torch.cat([self.gather(look, question), *extra], 1))

    def gather(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """What the head reads of the look and the question, (B, inputs)."""
        seen = self.see(self.drop((look - self.mean) / self.std)).flatten(2)
        here = there(look)
        mean = here / here.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([(mean[..., None] * seen).sum(1), self.question(question)], 1)

    def flops(self, slides: int) -> float:
        """FLOPs of one decision about a case of so many slides, without a glance (a multiply-add counts 2)."""
        narrow = self.config.width // 4
        first, last = self.head[2], self.head[-1]
        return 2.0 * (
            slides * sum(self.config.look) * self.config.feature_dim * narrow
            + first.in_features * first.out_features
            + last.in_features * last.out_features
            + (self.config.state_dim + len(self.config.ladder)) * self.config.width * (self.beside is not None)
        )

    @torch.no_grad()
    def standardise(self, look: torch.Tensor | Look) -> None:
        """Set mean and deviation of the features from the looks (B, K, tokens, d) of training cases."""
        if isinstance(look, Look):
            assert self.beside is not None
            self.beside.mean.copy_(look.state.mean(0))
            self.beside.std.copy_(look.state.std(0).clamp_min(1e-3))
            self.standardise(look.tokens)
            return
        rows = look[there(look)].flatten(0, 1)
        if not len(rows):
            return  # the question is all that is looked at
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(1e-3))


def there(look: torch.Tensor) -> torch.Tensor:
    """Which slides (B, K) a case has; the looks at others are nought."""
    return look.flatten(2).any(-1)


def widened(start: Network, **changes: Any) -> Network:
    """A copy with further inputs (keys of its configuration), which decides as it did until it is fitted."""
    made = type(start)(type(start.config).from_dict({**start.config.to_dict(), **changes}))
    made.load_state_dict({**made.state_dict(), **start.state_dict()})
    return made
