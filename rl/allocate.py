"""Fit the allocator on the score table of a frozen performer.

    python rl/allocate.py --config configs/recipes/<x>.yaml

The table is that of the validation cases, which the performer was not trained on. It is read from the run's folder,
or made if it is not there yet. How long to fit is chosen by cross-validation over patients: a few hundred answers are
learnt by heart within some epochs.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import GroupKFold

from models.allocator import CheapLook, ValueAllocator
from models.performer import Performer
from rl.allocation import fit_table
from rl.checkpoints import is_done, mark_done
from rl.recipe import parse_recipe
from rl.stages import Stages
from rl.table import ScoreTable
from slides.errors import entry

FOLDS = 5


@dataclass
class Fitted:
    """An allocator and its choices on the cases it was fitted on, each made by a fit that had not seen the patient.

    Args:
        values: (N, rungs) predicted scores, out of fold.
    """

    allocator: ValueAllocator
    values: np.ndarray


def fit_allocator(stages: Stages, performer: Performer, start: ValueAllocator, table: ScoreTable) -> Fitted:
    """Fit on a table, starting from the jointly trained allocator, and predict out of fold for honest choices.

    The number of epochs is that of the least cross-entropy on held-out patients.
    """
    options = stages.run.allocator
    folder = stages.run.folder / "allocator"
    parts = {**stages.grpo_parts(), "fit": vars(options)}
    cases = stages.splits["val"]
    look, question = CheapLook(performer, start.config)(cases)
    table_score = table.at(stages.run.ladder).score
    score = torch.tensor(table_score, dtype=torch.float32)
    if is_done(folder, parts):
        return Fitted(ValueAllocator.from_pretrained(folder), np.load(folder / "out_of_fold.npy"))

    def fit(rows: np.ndarray, epochs: int, held: np.ndarray | None = None) -> tuple[ValueAllocator, np.ndarray]:
        """The allocator, and its predictions (epochs, held, rungs) after each epoch."""
        torch.manual_seed(stages.run.grpo.seed)
        allocator = copy.deepcopy(start)
        index, found = torch.from_numpy(rows), []

        def record(_: int) -> None:
            if held is not None:
                found.append(predict(allocator, look[held], question[held]))

        fit_table(
            allocator,
            look[index],
            question[index],
            score[index],
            epochs=epochs,
            learning_rate=options.fit_learning_rate,
            weight_decay=options.weight_decay,
            seed=stages.run.grpo.seed,
            after_epoch=record,
        )
        return allocator, np.array(found)

    values = np.zeros((options.fit_epochs, *score.shape))
    patients = [c.patient for c in cases]
    folds = min(FOLDS, len(set(patients)))
    for seen, held in GroupKFold(folds).split(np.arange(len(cases)), groups=patients):
        values[:, held] = fit(seen, options.fit_epochs, held)[1]
    sure = values.clip(1e-6, 1 - 1e-6)
    loss = -(table_score * np.log(sure) + (1 - table_score) * np.log(1 - sure)).mean((1, 2))
    epochs = int(loss.argmin()) + 1
    fitted, _ = fit(np.arange(len(cases)), epochs)
    values = values[epochs - 1]
    if stages.is_main:
        fitted.save_pretrained(folder)
        np.save(folder / "out_of_fold.npy", values)
        mark_done(folder, parts, n=len(cases), epochs=epochs, loss=loss.tolist())
    return Fitted(fitted, values)


@torch.no_grad()
def predict(allocator: ValueAllocator, look: torch.Tensor, question: torch.Tensor) -> np.ndarray:
    """Predicted scores (B, rungs)."""
    allocator.eval()
    return allocator(look, question).sigmoid().double().numpy()


@entry
def main() -> None:
    """Fit on the recipe's run."""
    stages = Stages(parse_recipe())
    performer, start = stages.joint()
    fitted = fit_allocator(stages, performer, start, stages.table("grpo", performer, "val"))
    error = np.abs(fitted.values - stages.table("grpo", performer, "val").at(stages.run.ladder).score).mean()
    print(f"allocator fitted on {len(fitted.values)} cases, mean absolute error out of fold {error:.3f}")
    print(f"written to {stages.run.folder / 'allocator'}")


if __name__ == "__main__":
    main()
