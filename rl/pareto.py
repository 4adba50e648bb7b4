"""Accuracy against cost of a finished run, with every control.

    frugalpath pareto --config configs/recipes/<x>.yaml
    frugalpath pareto --config configs/recipes/<x>.yaml --transfer configs/recipes/<other>.yaml

Takes a run that rl/grpo.py has trained. Reads its score tables (and makes those that are missing) and writes
`report/`: summary.json, cases.jsonl, pareto.png and report.html. All choices (best static budget, operating price) are
made on validation cases; all figures are of test cases. With `--transfer` the run is applied as it is to the test
cases of another recipe instead, see `frugalpath.evaluation.transfer`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frugalpath.allocator.base import Allocator
from frugalpath.allocator.collapse import collapse
from frugalpath.allocator.forms import keep_allocator, load_allocator
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.distributed import is_main
from frugalpath.errors import entry
from frugalpath.evaluation.cautions import warnings_of
from frugalpath.evaluation.controls import attribute, linear_probe
from frugalpath.evaluation.metrics import field_results
from frugalpath.evaluation.report.card import write_card
from frugalpath.evaluation.report.console import print_outcome, print_summary
from frugalpath.evaluation.report.writing import write_report
from frugalpath.evaluation.run import Evaluator
from frugalpath.evaluation.transfer import transfer
from frugalpath.recipe.data import load_data
from frugalpath.recipe.finished import check_finished, check_trained
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.pipeline import control_tables, fit_allocator, train_joint, trained_run


def evaluate(allocator: Allocator, controls: Mapping[str, Mapping[str, ScoreTable]]) -> dict[str, Any]:
    """Evaluate on the test cases and write the report; returns the summary.

    Args:
        allocator: fitted on the validation cases.
        controls: tables by split of the performer before GRPO: `base` (untrained), `sft`, and others.
    """
    data, evaluator = allocator.data, Evaluator(allocator)
    outcome = evaluator.on_test()
    stages = {name: tables for name, tables in controls.items() if name != "base"}
    stages["grpo"] = {"val": evaluator.val, "test": outcome.whole}
    found = attribute(evaluator.ladder, controls["base"]["test"], stages, outcome.bootstrap)
    summary = outcome.summary()
    gains = {
        f"gain_over_{name}": outcome.bootstrap.difference(found.scores["grpo"] - scores)
        for name, scores in found.scores.items()
        if name != "grpo"
    }
    summary["headline"] |= gains
    points = {name: p.to_dict() for name, p in found.points.items()}
    run, best = data.run, outcome.preferred.best
    summary |= {
        "attribution": {**points, "grpo_allocator": summary["operating_point"]},
        "synoptic": field_results(outcome.cases, found.texts, run.evaluation.bootstrap, run.grpo.seed),
        "linear_probe": linear_probe(data, outcome.whole, outcome.decisions.rungs, best, outcome.bootstrap),
        "warnings": [*warnings_of(outcome), *collapse(allocator)],
    }
    summary = write_report(data, allocator.performer, outcome, summary)
    keep_allocator(allocator)
    if is_main():
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
    if options.transfer is not None:
        check_finished(run)
    data = load_data(run)
    performer, network = train_joint(data)  # read from the run's folder
    trained = trained_run(data, performer)
    if options.transfer is not None:
        summary, folder = transfer(load_allocator(data, performer, trained.tables, trained.key), options.transfer)
        if is_main():
            print_outcome(summary, folder)
        return
    summary = evaluate(fit_allocator(trained, network), control_tables(data))
    if is_main():
        print_summary(summary, run.folder / "report")


if __name__ == "__main__":
    main()
