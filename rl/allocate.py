"""Fit the allocator on the score table of a frozen performer.

    frugalpath allocate --config configs/recipes/<x>.yaml

The table is that of the validation cases, which the performer was not trained on. It is read from the run's folder,
or made if it is not there yet. How long to fit is chosen by cross-validation over patients: a few hundred answers are
learnt by heart within some epochs.
"""

from __future__ import annotations

import numpy as np

from frugalpath.allocator.collapse import collapse
from frugalpath.allocator.forms import keep_allocator
from frugalpath.errors import entry
from frugalpath.recipe.data import load_data
from frugalpath.recipe.finished import SUMMARY, check_trained
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.pipeline import fit_allocator, train_joint, trained_run


@entry
def main() -> None:
    """Fit on the recipe's run."""
    run = parse_recipe()
    check_trained(run)
    data = load_data(run)
    performer, network = train_joint(data)
    trained = trained_run(data, performer)
    allocator = fit_allocator(trained, network)
    predicted = allocator.predicted("val")
    if predicted is not None:
        error = np.abs(predicted - trained.tables["val"].at(run.ladder).score).mean()
        print(f"allocator fitted on {len(predicted)} cases, mean absolute error out of fold {error:.3f}")
    for warning in collapse(allocator):
        print(f"warning: {warning}")
    if (run.folder / SUMMARY).is_file():
        print("the report, and what answers, are as before; rl/pareto.py makes them anew")
    else:
        keep_allocator(allocator)
    print(f"written to {run.folder / allocator.folder}")


if __name__ == "__main__":
    main()
