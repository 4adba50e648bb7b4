"""The allocator is fitted at once, on the score table of a frozen performer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import GroupKFold

from models.allocators.value import ValueAllocator

FOLDS = 5


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
