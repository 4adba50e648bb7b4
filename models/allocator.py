"""The allocator: predicts the performer's score at every rung of the ladder from the cheapest look and the question.

It acts by predicted score minus price times cost, so that one trained allocator serves every price. The look is the
pooled tokens of the smallest budgets, which the frozen encoder's stored features give without a model pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from envs.case import Case
from models.performer import Performer, question_text


class AllocatorConfig(PreTrainedConfig):
    """Configuration of `ValueAllocator`.

    Args:
        ladder: budgets in tokens, ascending.
        look: the budgets whose pooled tokens make up the cheapest look.
        feature_dim: width d of the patch features.
        width: hidden width; buckets: size of the hashed vocabulary of question tokens.
        dropout: before the hidden layer; look_dropout: of the standardised features of the look.
    """

    model_type = "frugalpath_value_allocator"

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
        self.ladder, self.look = list(ladder), list(look)
        self.feature_dim, self.width, self.buckets = feature_dim, width, buckets
        self.dropout, self.look_dropout = dropout, look_dropout
        super().__init__(**kwargs)


class ValueAllocator(PreTrainedModel):
    """Predicted score (as a logit) of every rung: look (B, sum(look), d) and question (B, T) -> (B, rungs)."""

    config_class = AllocatorConfig

    def __init__(self, config: AllocatorConfig):
        super().__init__(config)
        tokens = sum(config.look)
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("std", torch.ones(config.feature_dim))
        self.drop = nn.Dropout(config.look_dropout)
        self.see = nn.Linear(config.feature_dim, config.width // 4)
        self.question = nn.EmbeddingBag(config.buckets, config.width, mode="mean", padding_idx=0)
        self.head = nn.Sequential(
            nn.LayerNorm(tokens * (config.width // 4) + config.width),
            nn.Dropout(config.dropout),
            nn.Linear(tokens * (config.width // 4) + config.width, config.width),
            nn.GELU(),
            nn.Linear(config.width, len(config.ladder)),
        )
        self.post_init()

    def forward(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits (B, rungs) of the performer's score."""
        seen = self.see(self.drop((look - self.mean) / self.std)).flatten(1)
        return self.head(torch.cat([seen, self.question(question)], 1))

    @property
    def flops(self) -> float:
        """FLOPs of one decision (a multiply-add counts 2)."""
        narrow = self.config.width // 4
        tokens = sum(self.config.look)
        first, last = self.head[2], self.head[-1]
        return 2.0 * (
            tokens * self.config.feature_dim * narrow
            + first.in_features * first.out_features
            + last.in_features * last.out_features
        )

    @torch.no_grad()
    def standardise(self, look: torch.Tensor) -> None:
        """Set mean and deviation of the features from the looks (B, tokens, d) of training cases."""
        rows = look.flatten(0, 1)
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(1e-3))

    @torch.no_grad()
    def choose(self, look: torch.Tensor, question: torch.Tensor, price: float, cost: torch.Tensor) -> torch.Tensor:
        """Rungs (B,) that maximise predicted score minus price times cost.

        Args:
            cost: (rungs,) or (B, rungs), the largest budget = 1.
        """
        was_training = self.training
        self.eval()
        value = self(look, question).sigmoid() - price * cost
        self.train(was_training)
        return value.argmax(-1)


class CheapLook:
    """Inputs of the allocator: what it may look at before any budget is spent."""

    def __init__(self, performer: Performer, config: AllocatorConfig):
        self.performer, self.config = performer, config

    def __call__(self, cases: Sequence[Case]) -> tuple[torch.Tensor, torch.Tensor]:
        """Look (B, tokens, d) and hashed question tokens (B, T), 0-padded."""
        looks = torch.stack([self._look(c) for c in cases])
        tokenizer = self.performer.processor.tokenizer
        ids = [tokenizer(question_text(c, self.performer.show_options))["input_ids"] for c in cases]
        question = torch.zeros(len(cases), max(map(len, ids)), dtype=torch.long)
        for row, tokens in zip(question, ids, strict=True):
            row[: len(tokens)] = torch.tensor([1 + t % (self.config.buckets - 1) for t in tokens])
        return looks, question

    def _look(self, case: Case) -> torch.Tensor:
        sources = self.performer.sources(case)
        d = self.config.feature_dim
        look = torch.zeros(sum(self.config.look), d)
        for source in sources:
            at = 0
            for tokens, size in zip(
                self.performer.bank.see_all(source, self.config.look), self.config.look, strict=True
            ):
                look[at : at + len(tokens)] += tokens.rows[:, :d] / len(sources)
                at += size
        return look
