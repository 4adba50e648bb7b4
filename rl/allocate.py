"""Fit the allocator on the score table of a frozen performer.

    python rl/allocate.py --config configs/recipes/<x>.yaml

The table is that of the validation cases, which the performer was not trained on. It is read from the run's folder,
or made if it is not there yet. How long to fit is chosen by cross-validation over patients: a few hundred answers are
learnt by heart within some epochs.
"""

from __future__ import annotations

import numpy as np

from frugalpath.allocator.base import Decider
from frugalpath.allocator.cascade import fit_escalate
from frugalpath.allocator.collapse import collapsed
from frugalpath.allocator.forms import keep_decider
from frugalpath.allocator.network import LookNetwork
from frugalpath.allocator.policy import PolicyAllocator, fit_policy
from frugalpath.allocator.text import text_decider
from frugalpath.allocator.value import ValueAllocator, fit_value
from frugalpath.deploy.run import SUMMARY, check_trained
from frugalpath.errors import entry
from frugalpath.models.performer import Performer
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.stages import Stages


def make_decider(stages: Stages, performer: Performer, start: LookNetwork) -> Decider:
    """An allocator of the recipe's form that is ready to decide.

    Args:
        start: the jointly trained network.
    """
    form = stages.run.allocator.form
    if form == "text":
        return text_decider(stages, performer)
    table = stages.table("grpo", performer, "val")
    if form == "policy" and isinstance(start, PolicyAllocator):
        return fit_policy(stages, performer, start, table)
    if form == "value" and isinstance(start, ValueAllocator):
        return fit_value(stages, performer, start, table)
    if form == "escalate":
        return fit_escalate(stages, performer, table)
    raise TypeError(f"no decider of the form {form} starts from a {type(start).__name__}")


def collapse(stages: Stages, performer: Performer, decider: Decider) -> list[str]:
    """Warnings about choices that are the same, or blind to the image, for all validation cases at every price."""
    prices = decider.prices(stages.run.evaluation.prices) if decider.settled is None else [decider.settled]
    rungs = {price: decider.decide("val", price).rungs for price in prices}
    below_cap = stages.objective(performer).below_cap
    found = collapsed(rungs, [c.prompt for c in stages.splits["val"]], decider.ladder, below_cap)
    return [*found, *decider.warnings()]


@entry
def main() -> None:
    """Fit on the recipe's run."""
    run = parse_recipe()
    check_trained(run)
    stages = Stages(run)
    performer, start = stages.joint()
    decider = make_decider(stages, performer, start)
    predicted = decider.predicted("val")
    if predicted is not None:
        error = np.abs(predicted - stages.table("grpo", performer, "val").at(stages.run.ladder).score).mean()
        print(f"allocator fitted on {len(predicted)} cases, mean absolute error out of fold {error:.3f}")
    for warning in collapse(stages, performer, decider):
        print(f"warning: {warning}")
    if (run.folder / SUMMARY).is_file():
        print("the report, and what answers, are as before; rl/pareto.py makes them anew")
    else:
        keep_decider(decider)
    print(f"written to {run.folder / decider.folder}")


if __name__ == "__main__":
    main()
