"""How the allocator learns: online from rollouts, or at once from a table of scores."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.model_selection import GroupKFold

from envs.case import Case
from models.allocator import CheapLook, ValueAllocator

FOLDS = 5


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


def fit_table(
    allocator: ValueAllocator,
    look: torch.Tensor,
    question: torch.Tensor,
    scores: torch.Tensor,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    seed: int = 0,
    after_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Fit the allocator on score[case, rung] of a frozen performer; returns the mean loss of each epoch.

    Args:
        look: (N, K, tokens, d). question: (N, T). scores: (N, rungs) in 0..1, of answers at the allocator's own
            shares, which therefore stay as they are.
        seed: of the order of the cases and of dropout.
        after_epoch: called with the number of each epoch, from 0.
    """
    torch.manual_seed(seed)
    allocator.standardise(look)
    fitted = [p for name, p in allocator.named_parameters() if not name.startswith("shares.")]
    optimizer = torch.optim.AdamW(fitted, learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        allocator.train()
        total = 0.0
        for rows in torch.randperm(len(scores), generator=generator).split(batch_size):
            loss = F.binary_cross_entropy_with_logits(allocator(look[rows], question[rows]), scores[rows])
            allocator.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(scores))
        allocator.eval()
        if after_epoch is not None:
            after_epoch(epoch)
    return losses


def fit_by_patient(
    start: ValueAllocator,
    look: torch.Tensor,
    question: torch.Tensor,
    scores: torch.Tensor,
    patients: Sequence[str],
    epochs: int,
    seed: int = 0,
    **options: Any,
) -> tuple[ValueAllocator, np.ndarray, list[float]]:
    """Fit for as many epochs as held-out patients profit from.

    Args:
        start: what every fit starts from; it is not changed.
        patients: of the N cases; those of one patient are held out together, in at most five folds.
        epochs: at most so many; the one of the least cross-entropy on held-out patients is taken.
        options: of `fit_table`.

    Returns:
        The allocator fitted on all cases; predicted scores (N, rungs), each by a fit that had not seen the patient;
        the held-out cross-entropy of every epoch.
    """
    values = np.zeros((epochs, *scores.shape))
    for seen, held in GroupKFold(min(FOLDS, len(set(patients)))).split(look, groups=patients):
        fold = copy.deepcopy(start)

        def record(epoch: int, fold: ValueAllocator = fold, held: np.ndarray = held) -> None:
            values[epoch, held] = predict(fold, look[held], question[held])

        fit_table(fold, look[seen], question[seen], scores[seen], epochs, seed=seed, after_epoch=record, **options)
    truth, sure = scores.double().numpy(), values.clip(1e-6, 1 - 1e-6)
    losses = -(truth * np.log(sure) + (1 - truth) * np.log(1 - sure)).mean((1, 2))
    best = int(losses.argmin())
    allocator = copy.deepcopy(start)
    fit_table(allocator, look, question, scores, best + 1, seed=seed, **options)
    return allocator, values[best], losses.tolist()


@torch.no_grad()
def predict(allocator: ValueAllocator, look: torch.Tensor, question: torch.Tensor) -> np.ndarray:
    """Predicted scores (B, rungs)."""
    allocator.eval()
    return allocator(look, question).sigmoid().double().numpy()
