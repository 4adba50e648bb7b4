"""The allocator is fitted at once, on the score table of a frozen performer.

Fits a network on the validation cases' table, or reads a finished fit from the run's folder.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import GroupKFold

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.network import AllocatorInputs, AllocatorNetwork
from frugalpath.distributed import is_main
from frugalpath.errors import InputError
from frugalpath.recipe.checkpoints import Clock, is_done, mark_done

FOLDS = 5

Network = TypeVar("Network", bound=AllocatorNetwork)
Inputs: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Looks (B, K, tokens, d) and questions (B, T)."""


class Aim(ABC, Generic[Network]):
    """What a fit is after, on the network's inputs and scores (B, rungs) in 0..1."""

    @abstractmethod
    def loss(self, allocator: Network, inputs: Inputs, scores: torch.Tensor, epoch: int) -> torch.Tensor:
        """What a step makes smaller."""

    @abstractmethod
    def predict(self, allocator: Network, inputs: Inputs) -> np.ndarray:
        """What the allocator says of cases, (B, ...)."""

    @abstractmethod
    def held_out(self, predicted: np.ndarray, scores: np.ndarray) -> float:
        """How far predictions (N, ...) miss the scores (N, rungs) of cases that were held out; less is better."""


class Regression(Aim[AllocatorNetwork]):
    """Predicted scores, by cross-entropy."""

    def loss(self, allocator: AllocatorNetwork, inputs: Inputs, scores: torch.Tensor, epoch: int) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(allocator(*inputs), scores)

    def predict(self, allocator: AllocatorNetwork, inputs: Inputs) -> np.ndarray:
        return predict(allocator, *inputs)

    def held_out(self, predicted: np.ndarray, scores: np.ndarray) -> float:
        sure = predicted.clip(1e-6, 1 - 1e-6)
        return float(-np.mean(scores * np.log(sure) + (1 - scores) * np.log(1 - sure)))


def fit_table(
    allocator: Network,
    look: torch.Tensor,
    question: torch.Tensor,
    scores: torch.Tensor,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    seed: int = 0,
    after_epoch: Callable[[int], None] | None = None,
    aim: Aim | None = None,
) -> list[float]:
    """Fit the allocator on score[case, rung] of a frozen performer; returns the mean loss of each epoch.

    Args:
        look: (N, K, tokens, d). question: (N, T). scores: (N, rungs) in 0..1.
        seed: of the order of the cases and of dropout.
        after_epoch: called with the number of each epoch, from 0.
        aim: regression by default.
    """
    aim = aim or Regression()
    torch.manual_seed(seed)
    allocator.standardise(look)
    optimizer = torch.optim.AdamW(allocator.parameters(), learning_rate, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for epoch in range(epochs):
        allocator.train()
        total = 0.0
        for rows in torch.randperm(len(scores), generator=generator).split(batch_size):
            loss = aim.loss(allocator, (look[rows], question[rows]), scores[rows], epoch)
            allocator.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / len(scores))
        allocator.eval()
        if after_epoch is not None:
            after_epoch(epoch)
    return losses


def by_patient(patients: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit on and rows held out, of each of at most five folds; those of a patient are held out together."""
    return list(GroupKFold(min(FOLDS, len(set(patients)))).split(patients, groups=patients))


def fit_by_patient(
    start: Network,
    look: torch.Tensor,
    question: torch.Tensor,
    scores: torch.Tensor,
    patients: Sequence[str],
    epochs: int,
    seed: int = 0,
    aim: Aim | None = None,
    **options: Any,
) -> tuple[Network, np.ndarray, list[float]]:
    """Fit for as many epochs as held-out patients profit from.

    Args:
        start: what every fit starts from; it is not changed.
        patients: of the N cases, see `by_patient`.
        epochs: at most so many; the one that does best on held-out patients is taken.
        aim: regression by default. options: of `fit_table`.

    Returns:
        The allocator fitted on all cases; what the aim predicts of them (N, ...), each by a fit that had not seen the
        patient; how far each epoch missed held-out patients.
    """
    aim = aim or Regression()
    values = list[np.ndarray]()
    for seen, held in by_patient(patients):
        fold = copy.deepcopy(start)

        def record(epoch: int, fold: Network = fold, held: np.ndarray = held) -> None:
            own = aim.predict(fold, (look[held], question[held]))
            if epoch == len(values):
                values.append(np.zeros((len(scores), *own.shape[1:]), own.dtype))
            values[epoch][held] = own

        known = look[seen], question[seen], scores[seen]
        fit_table(fold, *known, epochs, seed=seed, after_epoch=record, aim=aim, **options)
    truth = scores.double().numpy()
    losses = [aim.held_out(predicted, truth) for predicted in values]
    best = int(np.argmin(losses))
    allocator = copy.deepcopy(start)
    fit_table(allocator, look, question, scores, best + 1, seed=seed, aim=aim, **options)
    return allocator, values[best], losses


@torch.no_grad()
def predict(allocator: AllocatorNetwork, look: torch.Tensor, question: torch.Tensor) -> np.ndarray:
    """Predicted scores (B, rungs)."""
    allocator.eval()
    return allocator(look, question).sigmoid().double().numpy()


OUT_OF_FOLD = "out_of_fold.npy"


def fit_key(trained: TrainedRun) -> dict[str, Any]:
    """What a fit depends on."""
    return {**trained.key, "fit": trained.data.run.allocator.settings()}


def fitted(trained: TrainedRun, start: Network, aim: Aim[Network]) -> tuple[Network, np.ndarray]:
    """The fitted network, and what the aim predicts of the validation cases out of fold."""
    run = trained.data.run
    options, folder = run.allocator, run.folder / "allocator"
    key = fit_key(trained)
    table = trained.tables["val"].at(run.ladder)
    record = is_done(folder, key)
    if record and record.get("table") == table.digest:
        return read_fit(trained, type(start))
    clock, cases = Clock(), trained.data.splits["val"]
    look, question = AllocatorInputs(trained.performer, start.config)(cases)
    network, values, losses = fit_by_patient(
        start,
        look,
        question,
        torch.tensor(table.score, dtype=torch.float32),
        [c.patient for c in cases],
        epochs=options.fit_epochs,
        learning_rate=options.fit_learning_rate,
        weight_decay=options.weight_decay,
        seed=run.grpo.seed,
        aim=aim,
    )
    if is_main():
        network.save_pretrained(folder)
        np.save(folder / OUT_OF_FOLD, values)
        mark_done(folder, key, n=len(cases), loss=losses, table=table.digest, seconds=clock.seconds)
    return network, values


def check_fitted_on(trained: TrainedRun, digest: str | None) -> None:
    """Refuse a fit on other scores of the validation cases than there are now.

    Args:
        digest: of the table it was fitted on; None where an earlier version kept none.

    Raises:
        InputError: labels, rewards or answers have changed since.
    """
    run = trained.data.run
    if digest is None or "val" not in trained.tables or trained.tables["val"].at(run.ladder).digest == digest:
        return
    recipe = f"--config {run.path}" if run.path else "--config RECIPE"
    raise InputError(
        f"{run.folder / 'allocator'}: was fitted on other scores of the validation cases (labels, rewards or answers "
        f"have changed since); run: frugalpath pareto {recipe}"
    )


def read_fit(trained: TrainedRun, network: type[Network]) -> tuple[Network, np.ndarray]:
    """What `fitted` left in the run's folder; a published one has nothing of the validation cases.

    Raises:
        InputError: other settings were fitted, or other scores of the validation cases.
    """
    folder, rungs = trained.data.run.folder / "allocator", len(trained.data.run.ladder)
    if trained.key:
        record = is_done(folder, fit_key(trained)) or {}
        check_fitted_on(trained, record.get("table"))
    kept = folder / OUT_OF_FOLD
    return network.from_pretrained(folder), np.load(kept) if kept.is_file() else np.zeros((0, rungs))
