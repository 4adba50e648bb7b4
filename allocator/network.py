"""The small network behind an allocator: it reads the cheapest look and the question.

What an allocator may look at before any budget is spent.

The look is the pooled tokens of the smallest budgets, which the frozen encoder's stored features give without a model
pass, and the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from frugalpath.envs.case import Case
from frugalpath.errors import InputError, removed
from frugalpath.models.performer import Performer, question_text

FORMER: dict[str, Any] = {"share": "equal", "look_state": None, "look_confidence": None, "state_dim": 0}
"""Removed keys of a saved configuration, with their former defaults."""


class AllocatorConfig(PreTrainedConfig):
    """Configuration of every allocator that is a small network.

    Args:
        ladder: budgets in tokens, ascending.
        look: the budgets whose pooled tokens make up the cheapest look.
        feature_dim: width d of the patch features.
        width: hidden width; buckets: size of the hashed vocabulary of question tokens.
        dropout: before the hidden layer; look_dropout: of the standardised features of the look.

    Raises:
        InputError: it was saved with a feature that was removed.
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
        **kwargs: Any,
    ):
        for key, usual in FORMER.items():
            if (value := kwargs.pop(key, usual)) != usual:
                made = f"the saved allocator has {key} {value!r}, which"
                raise InputError(removed(made, "train again without it, in a new folder"))
        self.ladder, self.look = list(ladder), list(look)
        self.feature_dim, self.width, self.buckets = feature_dim, width, buckets
        self.dropout, self.look_dropout = dropout, look_dropout
        super().__init__(**kwargs)


class AllocatorNetwork(PreTrainedModel):
    """Reads look (B, K, sum(look), d) and question (B, T), and writes one output a rung.

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
        self.head = nn.Sequential(
            nn.LayerNorm(inputs),
            nn.Dropout(config.dropout),
            nn.Linear(inputs, config.width),
            nn.GELU(),
            nn.Linear(config.width, len(config.ladder)),
        )
        self.post_init()

    def read(self, look: torch.Tensor, question: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        """Outputs (B, rungs)."""
        return self.head(torch.cat([self.gather(look, question), *extra], 1))

    def gather(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """What the head reads of the look and the question, (B, inputs)."""
        seen = self.see(self.drop((look - self.mean) / self.std)).flatten(2)
        here = there(look)
        mean = here / here.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([(mean[..., None] * seen).sum(1), self.question(question)], 1)

    def flops(self, slides: int) -> float:
        """FLOPs of one decision about a case of so many slides (a multiply-add counts 2)."""
        narrow = self.config.width // 4
        first, last = self.head[2], self.head[-1]
        return 2.0 * (
            slides * sum(self.config.look) * self.config.feature_dim * narrow
            + first.in_features * first.out_features
            + last.in_features * last.out_features
        )

    @torch.no_grad()
    def standardise(self, look: torch.Tensor) -> None:
        """Set mean and deviation of the features from the looks (B, K, tokens, d) of training cases."""
        rows = look[there(look)].flatten(0, 1)
        if not len(rows):
            return  # the question is all that is looked at
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(1e-3))


def there(look: torch.Tensor) -> torch.Tensor:
    """Which slides (B, K) a case has; the looks at others are nought."""
    return look.flatten(2).any(-1)


class AllocatorInputs:
    """Inputs of the allocator: what it may look at before any budget is spent."""

    def __init__(self, performer: Performer, config: AllocatorConfig):
        self.performer, self.config = performer, config

    def __call__(self, cases: Sequence[Case]) -> tuple[torch.Tensor, torch.Tensor]:
        """Look (B, K, tokens, d) and hashed question tokens (B, T), both 0-padded; K is the most slides of a case."""
        looks = pad_sequence([self._look(c) for c in cases], batch_first=True)
        tokenizer = self.performer.processor.tokenizer
        ids = [tokenizer(question_text(c, self.performer.show_options))["input_ids"] for c in cases]
        question = torch.zeros(len(cases), max(map(len, ids)), dtype=torch.long)
        for row, tokens in zip(question, ids, strict=True):
            row[: len(tokens)] = torch.tensor([1 + t % (self.config.buckets - 1) for t in tokens])
        return looks, question

    def _look(self, case: Case) -> torch.Tensor:
        """Look (K, tokens, d) at the slides of a case."""
        sources = self.performer.sources(case)
        d = self.config.feature_dim
        look = torch.zeros(len(sources), sum(self.config.look), d)
        for slide, source in zip(look, sources, strict=True):
            at = 0
            for tokens, size in zip(
                self.performer.bank.see_all(source, self.config.look), self.config.look, strict=True
            ):
                slide[at : at + len(tokens)] = tokens.rows[:, :d]
                at += size
        return look
