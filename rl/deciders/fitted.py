"""Fits a network on the validation cases' table, or reads a finished fit from the run's folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from envs.score_table import ScoreTable
from models.allocators.look import CheapLook
from models.performer import Performer
from rl.allocation.fitting import Aim, Network, fit_by_patient
from rl.checkpoints import Clock, is_done, mark_done
from rl.stages import Stages

OUT_OF_FOLD = "out_of_fold.npy"


def fit_parts(stages: Stages) -> dict[str, Any]:
    """What a fit depends on."""
    return {**stages.grpo_parts(), "fit": stages.run.allocator.settings()}


def fitted(
    stages: Stages, performer: Performer, start: Network, table: ScoreTable, aim: Aim[Network]
) -> tuple[Network, np.ndarray]:
    """The fitted network, and what the aim predicts of the validation cases out of fold."""
    options = stages.run.allocator
    folder = stages.run.folder / "allocator"
    parts = fit_parts(stages)
    if is_done(folder, parts):
        return read_fit(stages, type(start))
    clock, cases = Clock(), stages.splits["val"]
    look, question = CheapLook(performer, start.config)(cases)
    scores = torch.tensor(table.at(stages.run.ladder).score, dtype=torch.float32)
    allocator, values, losses = fit_by_patient(
        start,
        look,
        question,
        scores,
        [c.patient for c in cases],
        epochs=options.fit_epochs,
        learning_rate=options.fit_learning_rate,
        weight_decay=options.weight_decay,
        seed=stages.run.grpo.seed,
        aim=aim,
    )
    if stages.is_main:
        allocator.save_pretrained(folder)
        np.save(folder / OUT_OF_FOLD, values)
        mark_done(folder, parts, n=len(cases), loss=losses, seconds=clock.seconds)
    return allocator, values


def read_fit(stages: Stages, network: type[Network]) -> tuple[Network, np.ndarray]:
    """What `fitted` left in the run's folder; a published one has nothing of the validation cases."""
    folder = stages.run.folder / "allocator"
    kept = folder / OUT_OF_FOLD
    return network.from_pretrained(folder), np.load(kept) if kept.is_file() else np.zeros((0, len(stages.run.ladder)))
