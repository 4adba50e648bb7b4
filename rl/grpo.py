"""From cases to a Pareto report: SFT warm start, joint GRPO of performer and allocator, evaluation.

    accelerate launch rl/grpo.py --config configs/recipes/<x>.yaml [--set cases.slides=40 ...]

Every stage writes into its own folder of `output_dir`. A finished stage is not run again, and a run that was stopped
goes on from its last whole checkpoint when the same command is given again.
"""

from __future__ import annotations

import shutil

from frugalpath.distributed import is_main
from frugalpath.errors import entry
from frugalpath.evaluation.report.console import print_summary
from frugalpath.recipe.data import load_data
from frugalpath.recipe.run import Run, parse_recipe
from frugalpath.rl.pareto import evaluate
from frugalpath.rl.pipeline import control_tables, fit_allocator, train_joint, trained_run


@entry
def main() -> None:
    """Run the recipe."""
    run = parse_recipe()
    data = load_data(run)
    keep_recipe(run)
    performer, network = train_joint(data)  # after the supervised stages, where these are not finished
    allocator = fit_allocator(trained_run(data, performer), network)
    summary = evaluate(allocator, control_tables(data))
    if is_main():
        print_summary(summary, run.folder / "report")


def keep_recipe(run: Run) -> None:
    """Copy the recipe into the run's folder."""
    if is_main() and run.path:
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path, run.folder / "recipe.yaml")


if __name__ == "__main__":
    main()
