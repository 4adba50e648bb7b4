"""The allocator: predicts the performer's score at every rung of the ladder from the cheapest look and the question.

It acts by predicted score minus price times cost, so that one trained allocator serves every price. The look is the
pooled tokens of the smallest budgets, which the frozen encoder's stored features give without a model pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from envs.case import Case
from models.performer import Performer, question_text
from slides.errors import InputError

SHARES = ("equal", "attention")


class AllocatorConfig(PreTrainedConfig):
    """Configuration of `ValueAllocator`.

    Args:
        ladder: budgets in tokens, ascending.
        look: the budgets whose pooled tokens make up the cheapest look.
        feature_dim: width d of the patch features.
        width: hidden width; buckets: size of the hashed vocabulary of question tokens.
        dropout: before the hidden layer; look_dropout: of the standardised features of the look.
        share: how a budget is divided among the slides of a case: `equal`, or `attention` by what they show.
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
        share: str = "equal",
        **kwargs: Any,
    ):
        if share not in SHARES:
            raise InputError(f"allocator.share: {share!r} is not known; known are {', '.join(SHARES)}")
        self.ladder, self.look = list(ladder), list(look)
        self.feature_dim, self.width, self.buckets = feature_dim, width, buckets
        self.dropout, self.look_dropout, self.share = dropout, look_dropout, share
        super().__init__(**kwargs)


class SlideShares(nn.Module):
    """What share of a budget each slide of a case gets: attention over slides (Ilse et al. 2018, section 2.4).

    The same attention gathers the slides for the predicted score, and is learned with it: a slide that says more about
    how well the case will be answered gets more.
    """

    def __init__(self, config: AllocatorConfig):
        super().__init__()
        width = config.width // 4
        self.see = nn.Sequential(nn.LayerNorm(config.feature_dim), nn.Linear(config.feature_dim, width))
        self.question = nn.EmbeddingBag(config.buckets, width, mode="mean", padding_idx=0)
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


class ValueAllocator(PreTrainedModel):
    """Predicted score (as a logit) of every rung: look (B, K, sum(look), d), question (B, T) -> (B, rungs)."""

    config_class = AllocatorConfig

    def __init__(self, config: AllocatorConfig):
        super().__init__(config)
        tokens = sum(config.look)
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("std", torch.ones(config.feature_dim))
        self.drop = nn.Dropout(config.look_dropout)
        self.see = nn.Linear(config.feature_dim, config.width // 4)
        self.question = nn.EmbeddingBag(config.buckets, config.width, mode="mean", padding_idx=0)
        self.shares = SlideShares(config) if config.share == "attention" else None
        self.head = nn.Sequential(
            nn.LayerNorm(tokens * (config.width // 4) + config.width),
            nn.Dropout(config.dropout),
            nn.Linear(tokens * (config.width // 4) + config.width, config.width),
            nn.GELU(),
            nn.Linear(config.width, len(config.ladder)),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SlideShares):
            module.reset()

    def forward(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Logits (B, rungs) of the performer's score."""
        seen = self.see(self.drop((look - self.mean) / self.std)).flatten(2)
        gathered = (self._weights(look, question)[..., None] * seen).sum(1)
        return self.head(torch.cat([gathered, self.question(question)], 1))

    def _weights(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        there = _there(look)
        return _equal(there) if self.shares is None else self.shares(look, question, there)

    @torch.no_grad()
    def divide(self, look: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Shares (B, K) of a budget for the slides of each case: half of it equally, half by attention."""
        return (_equal(_there(look)) + self._weights(look, question)) / 2

    def flops(self, slides: int) -> float:
        """FLOPs of one decision about a case of so many slides (a multiply-add counts 2)."""
        narrow = self.config.width // 4
        looks = sum(self.config.look) + (self.shares is not None)
        first, last = self.head[2], self.head[-1]
        return 2.0 * (
            slides * looks * self.config.feature_dim * narrow
            + first.in_features * first.out_features
            + last.in_features * last.out_features
        )

    @torch.no_grad()
    def standardise(self, look: torch.Tensor) -> None:
        """Set mean and deviation of the features from the looks (B, K, tokens, d) of training cases."""
        rows = look[look.flatten(2).any(-1)].flatten(0, 1)
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


def _there(look: torch.Tensor) -> torch.Tensor:
    """Which slides (B, K) a case has; the looks at others are nought."""
    return look.flatten(2).any(-1)


def _equal(there: torch.Tensor) -> torch.Tensor:
    return there / there.sum(1, keepdim=True).clamp_min(1)


class CheapLook:
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

    def divide(
        self, allocator: ValueAllocator, cases: Sequence[Case], *seen: torch.Tensor
    ) -> list[list[float] | None]:
        """Shares of a budget for the images and slides of each case; None where all get the same.

        Args:
            seen: look and question of the cases, where they are known already.
        """
        if allocator.shares is None:
            return [None] * len(cases)
        shares = allocator.divide(*(seen or self(cases)))
        return [row[: len(self.performer.sources(c))] for row, c in zip(shares.tolist(), cases, strict=True)]
