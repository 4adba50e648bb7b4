"""What an allocator may look at before any budget is spent.

The look is the pooled tokens of the smallest budgets, which the frozen encoder's stored features give without a model
pass, and the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from envs.case import Case
from models.allocators.network import AllocatorConfig
from models.performer import Performer, question_text


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
