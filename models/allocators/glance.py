"""A richer look: what the performer itself makes of a case at a small budget, before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from envs.case import Case
from models.generation import read_ends
from models.performer import Performer
from models.reuse import spared
from models.sight import Prompt
from models.tokenizer import TAGS

OPENING = "".join(TAGS[:3])
"""What every answer begins with; the token after it is the first of the answer itself."""


class Glance:
    """One forward of the performer over the prompt at a small budget and the opening of an answer.

    Args:
        budget: in tokens. state: whether its hidden state is told. confidence: whether it tells how sure it is.
    """

    def __init__(self, performer: Performer, budget: int, state: bool, confidence: bool):
        self.performer, self.budget, self.state, self.confidence = performer, budget, state, confidence
        tokenizer = performer.processor.tokenizer
        self._opening = torch.tensor(tokenizer(OPENING, add_special_tokens=False)["input_ids"])

    @staticmethod
    def width(performer: Performer, state: bool, confidence: bool) -> int:
        """Numbers E that it gives for a case."""
        return state * performer.shape.hidden + 2 * confidence

    def __call__(self, cases: Sequence[Case]) -> torch.Tensor:
        """(B, E): hidden state where the answer begins; probability (as a logit) of its first token, and entropy."""
        model = self.performer.model
        was_training = model.training
        model.eval()
        states, logits = read_ends(model, self.performer.processor.sight, [self._opened(c) for c in cases])
        model.train(was_training)
        logp = logits.log_softmax(-1)
        sure = logp.exp().amax(-1).logit(1e-4)
        entropy = torch.special.entr(logp.exp()).sum(-1)
        parts = [states] * self.state + [torch.stack([sure, entropy], 1)] * self.confidence
        return torch.cat(parts, 1)

    def flops(self, case: Case) -> float:
        """FLOPs of the forward."""
        return self.performer.flops(self._opened(case), 1)

    def spared(self, case: Case, after: Prompt) -> float:
        """FLOPs that it spares the answer to another prompt of the case: at the same budget, the whole reading."""
        return spared(self.performer, self.performer.prompt(case, self.budget), after)

    def _opened(self, case: Case) -> Prompt:
        prompt = self.performer.prompt(case, self.budget)
        more = prompt.next_position + torch.arange(len(self._opening))
        positions = torch.cat([prompt.positions, more.expand(len(prompt.positions), -1)], 1)
        return replace(prompt, ids=torch.cat([prompt.ids, self._opening]), positions=positions)
