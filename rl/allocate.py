"""Fit the allocator on the score table of a frozen performer.

    python rl/allocate.py --config configs/recipes/<x>.yaml

The table is that of the validation cases, which the performer was not trained on. It is read from the run's folder,
or made if it is not there yet. How long to fit is chosen by cross-validation over patients: a few hundred answers are
learnt by heart within some epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from models.allocator import CheapLook, ValueAllocator
from models.performer import Performer
from rl.allocation import fit_by_patient
from rl.checkpoints import is_done, mark_done
from rl.recipe import parse_recipe
from rl.stages import Stages
from rl.table import ScoreTable
from slides.errors import entry


@dataclass
class Fitted:
    """An allocator and its choices on the cases it was fitted on, each made by a fit that had not seen the patient.

    Args:
        values: (N, rungs) predicted scores, out of fold.
    """

    allocator: ValueAllocator
    values: np.ndarray


def fit_allocator(stages: Stages, performer: Performer, start: ValueAllocator, table: ScoreTable) -> Fitted:
    """Fit on a table, starting from the jointly trained allocator; a finished fit is read from the run's folder."""
    options = stages.run.allocator
    folder = stages.run.folder / "allocator"
    parts = {**stages.grpo_parts(), "fit": vars(options)}
    if is_done(folder, parts):
        return Fitted(ValueAllocator.from_pretrained(folder), np.load(folder / "out_of_fold.npy"))
    cases = stages.splits["val"]
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
    )
    if stages.is_main:
        allocator.save_pretrained(folder)
        np.save(folder / "out_of_fold.npy", values)
        mark_done(folder, parts, n=len(cases), loss=losses)
    return Fitted(allocator, values)


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
