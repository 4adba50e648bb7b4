"""The allocator learns online, from the scores of the budgets that were drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from envs.case import Case
from models.allocators.look import CheapLook
from models.allocators.value import ValueAllocator


@dataclass(frozen=True)
class Drawn:
    """Budgets drawn for a batch: look (B, K, tokens, d), question (B, T), rungs (B, M), shares of the slides."""

    look: torch.Tensor
    question: torch.Tensor
    rungs: torch.Tensor
    shares: list[list[float] | None]


class AllocatorLearner:
    """Draws budgets and learns from what came of them.

    Args:
        allocator: predicts the score of every rung.
        look: makes its inputs.
        cost: (rungs,), the largest budget = 1.
        price: lambda, the price of cost while exploring.
        temperature: spread of the drawn budgets around the best one, in units of value.
        explore: share of uniform draws, so that no rung starves.
    """

    def __init__(
        self,
        allocator: ValueAllocator,
        look: CheapLook,
        cost: torch.Tensor,
        price: float = 0.1,
        temperature: float = 0.03,
        explore: float = 0.3,
        learning_rate: float = 2e-3,
    ):
        self.allocator, self.look, self.cost = allocator, look, cost
        self.price, self.temperature, self.explore = price, temperature, explore
        self.ladder = list(allocator.config.ladder)
        self.optimizer = torch.optim.AdamW(allocator.parameters(), learning_rate, weight_decay=1e-2)

    @torch.no_grad()
    def draw(self, cases: Sequence[Case], count: int) -> Drawn:
        """Draw `count` budgets for each case from the exploring policy, different ones while the ladder has them."""
        look, question = self.look(cases)
        self.allocator.eval()
        value = self.allocator(look, question).sigmoid() - self.price * self.cost
        policy = (value / self.temperature).softmax(-1) * (1 - self.explore) + self.explore / len(self.ladder)
        # Where nothing is explored the second budget would have no probability at all.
        policy = policy.clamp_min(1e-9)
        rungs = torch.multinomial(policy, count, replacement=count > len(self.ladder))
        return Drawn(look, question, rungs, self.look.divide(self.allocator, cases, look, question))

    def update(
        self, look: torch.Tensor, question: torch.Tensor, rungs: torch.Tensor, score: torch.Tensor
    ) -> dict[str, float]:
        """One step of regression on the scores (B, M) of the drawn rungs (B, M); returns metrics."""
        self.allocator.train()
        predicted = self.allocator(look, question)
        loss = F.binary_cross_entropy_with_logits(predicted.gather(1, rungs), score.clamp(0, 1))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        best = (predicted.detach().sigmoid() - self.price * self.cost).argmax(-1)
        share = torch.bincount(best, minlength=len(self.ladder)) / len(best)
        tokens = torch.tensor(self.ladder, dtype=torch.float32)
        return {
            "loss": loss.item(),
            "score": score.mean().item(),
            "drawn_tokens": tokens[rungs].mean().item(),
            "chosen_tokens": tokens[best].mean().item(),
            "largest_share": share.max().item(),
        }

    def save(self, folder: str | Path) -> None:
        """Write allocator and optimizer beside a trainer's checkpoint."""
        self.allocator.save_pretrained(Path(folder) / "allocator")
        state = self.optimizer.state_dict()["state"]
        flat = {f"{k}.{name}": v for k, entry in state.items() for name, v in entry.items()}
        save_file(flat, Path(folder) / "allocator" / "optimizer.safetensors")

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        saved = ValueAllocator.from_pretrained(Path(folder) / "allocator")
        self.allocator.load_state_dict(saved.state_dict())
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in load_file(Path(folder) / "allocator" / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": state})
