"""Fit the allocator on the score table of a frozen performer.

    python rl/allocate.py --config configs/recipes/<x>.yaml

The table is that of the validation cases, which the performer was not trained on. It is read from the run's folder,
or made if it is not there yet. How long to fit is chosen by cross-validation over patients: a few hundred answers are
learnt by heart within some epochs.
"""

from __future__ import annotations

import numpy as np

from models.allocators.value import ValueAllocator
from models.performer import Performer
from rl.deciders.base import Decider
from rl.deciders.value import fit_value
from rl.recipe import parse_recipe
from rl.stages import Stages
from slides.errors import entry


def make_decider(stages: Stages, performer: Performer, start: ValueAllocator) -> Decider:
    """An allocator of the recipe's form that is ready to decide."""
    return fit_value(stages, performer, start, stages.table("grpo", performer, "val"))


@entry
def main() -> None:
    """Fit on the recipe's run."""
    stages = Stages(parse_recipe())
    performer, start = stages.joint()
    decider = make_decider(stages, performer, start)
    predicted = decider.predicted("val")
    if predicted is not None:
        error = np.abs(predicted - stages.table("grpo", performer, "val").at(stages.run.ladder).score).mean()
        print(f"allocator fitted on {len(predicted)} cases, mean absolute error out of fold {error:.3f}")
    print(f"written to {stages.run.folder / 'allocator'}")


if __name__ == "__main__":
    main()
