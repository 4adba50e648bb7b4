"""Accuracy against cost of a finished run, with every control.

    python rl/pareto.py --config configs/recipes/<x>.yaml
    python rl/pareto.py --config configs/recipes/<x>.yaml --transfer configs/recipes/<other>.yaml

Takes a run that rl/grpo.py has trained. Reads its score tables (and makes those that are missing) and writes
`report/`: summary.json, cases.jsonl, pareto.png and report.html. All choices (best static budget, operating price) are
made on validation cases; all figures are of test cases. With `--transfer` the run is applied as it is to the test
cases of another recipe instead, see `frugalpath.evaluation.transfer`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from frugalpath.allocator.forms import keep_decider
from frugalpath.allocator.network import LookNetwork
from frugalpath.deploy.run import check_trained
from frugalpath.errors import entry
from frugalpath.evaluation.controls import attribute, linear_probe
from frugalpath.evaluation.metrics import field_results
from frugalpath.evaluation.report.card import write_card
from frugalpath.evaluation.report.console import print_outcome, print_summary
from frugalpath.evaluation.report.writing import write_report
from frugalpath.evaluation.run import Trial
from frugalpath.evaluation.transfer import transfer
from frugalpath.evaluation.warnings import cautions
from frugalpath.models.performer import Performer
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.allocate import collapse, make_decider
from frugalpath.rl.stages import Stages


def evaluate(stages: Stages, performer: Performer, start: LookNetwork) -> dict[str, Any]:
    """Fit the allocator, evaluate on the test cases and write the report; returns the summary."""
    trial = Trial(stages, performer, make_decider(stages, performer, start))
    outcome = trial.on_test()
    found = attribute(stages, {"val": trial.val, "test": outcome.whole}, outcome.bootstrap)
    summary = outcome.summary()
    gains = {
        f"gain_over_{name}": outcome.bootstrap.difference(found.scores["grpo"] - scores)
        for name, scores in found.scores.items()
        if name != "grpo"
    }
    summary["headline"] |= gains
    points = {name: p.to_dict() for name, p in found.points.items()}
    run, best = stages.run, outcome.preferred.best
    summary |= {
        "attribution": {**points, "grpo_allocator": summary["operating_point"]},
        "synoptic": field_results(outcome.cases, found.texts, run.evaluation.bootstrap, run.grpo.seed),
        "linear_probe": linear_probe(stages, outcome.whole, outcome.decisions.rungs, best, outcome.bootstrap),
        "warnings": [*cautions(outcome), *collapse(stages, performer, trial.decider)],
    }
    summary = write_report(stages, performer, outcome, summary)
    keep_decider(trial.decider)
    if stages.is_main:
        write_card(run.folder / "grpo" / "README.md", run, summary)
    return summary


@entry
def main() -> None:
    """Report on the recipe's run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--transfer", type=Path)
    options, rest = parser.parse_known_args(sys.argv[1:])
    run = parse_recipe(rest)
    check_trained(run)
    stages = Stages(run)
    if options.transfer is not None:
        summary, folder = transfer(stages, options.transfer)
        if stages.is_main:
            print_outcome(summary, folder)
        return
    summary = evaluate(stages, *stages.joint())
    if stages.is_main:
        print_summary(summary, stages.run.folder / "report")


if __name__ == "__main__":
    main()
