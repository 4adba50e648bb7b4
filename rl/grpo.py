"""From cases to a Pareto report: SFT warm start, joint GRPO of performer and allocator, evaluation.

    accelerate launch rl/grpo.py --config configs/recipes/<x>.yaml [--set cases.slides=40 ...]

Every stage writes into its own folder of `output_dir`. A finished stage is not run again, and a run that was stopped
goes on from its last whole checkpoint when the same command is given again.
"""

from __future__ import annotations

import shutil

from accelerate import PartialState

from frugalpath.errors import entry
from frugalpath.evaluation.report.console import print_summary
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.pareto import evaluate
from frugalpath.rl.stages import Stages


@entry
def main() -> None:
    """Run the recipe."""
    run = parse_recipe()
    stages = Stages(run)
    if PartialState().is_main_process and run.path:
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path, run.folder / "recipe.yaml")
    performer, allocator = stages.joint()
    summary = evaluate(stages, performer, allocator)
    if PartialState().is_main_process:
        print_summary(summary, run.folder / "report")


if __name__ == "__main__":
    main()
