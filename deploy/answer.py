"""Answer one or many cases with a trained run, at a price or at a fixed budget.

    frugalpath answer --config RECIPE --image field.png --question "Is this metastasis?" --options normal metastasis
    frugalpath answer --config RECIPE --slide a.svs b.svs --question "What is the diagnosis?" --budget 16
    frugalpath answer --config RECIPE --manifest new.jsonl --price 0.1 --json --out answers.jsonl
    frugalpath answer --config RECIPE --split test
    frugalpath answer --model FOLDER --image field.png --question "Does this show metastasis?"

Needs only the recipe and the run's folders `grpo`, `allocator` and `report`, except with `--split`. Without --price
and --budget, the price chosen by the report is used. The output shows both stages: the probe that chooses a budget,
and the answer. Features are cached in the run's feature folder, or in a temporary folder if that one is missing or
read-only. See docs/pareto.md for how to choose a price and what to deploy.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import PartialState

from frugalpath.allocator.base import Allocator
from frugalpath.deploy.run import (
    answer_all,
    closing,
    deployed,
    feature_folder,
    head,
    line,
    not_an_option,
    totals,
)
from frugalpath.envs.case import TASKS, Case
from frugalpath.envs.new_cases import new_case, read_new_cases
from frugalpath.errors import InputError, entry
from frugalpath.evaluation.report.examples import foreign
from frugalpath.files import write_text
from frugalpath.recipe.cache_key import grpo_key
from frugalpath.recipe.checkpoints import is_done
from frugalpath.recipe.data import load_data, load_rewards
from frugalpath.recipe.finished import MARK, check_finished, evaluation, operating_price
from frugalpath.recipe.run import Run, parse_recipe
from frugalpath.rewards.scoring import Scorer


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into the arguments of this command and those of the recipe."""
    # The name of the recipe's parser would show in its help; abbreviations could be keys of the recipe.
    parser = argparse.ArgumentParser(
        prog="frugalpath answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other arguments belong to the recipe: --config, --set section.key=value, --output_dir RUN ...",
    )
    what = parser.add_argument_group("input (--image/--slide, --manifest or --split)")
    what.add_argument("--image", nargs="+", default=[], metavar="FILE", help="image files of one case")
    what.add_argument("--slide", nargs="+", default=[], metavar="FILE", help="slides or .h5 feature files of one case")
    what.add_argument("--manifest", metavar="FILE", help="file of cases, see docs/data.md; gold answers are optional")
    what.add_argument("--split", choices=("val", "test"), help="cases of the recipe; the allocator was fitted on val")
    what.add_argument(
        "--model", type=Path, metavar="FOLDER", help="folder written by `frugalpath publish`, instead of --config"
    )
    about = parser.add_argument_group("question (defaults for manifest rows)")
    about.add_argument("--question", metavar="TEXT", help="question text")
    about.add_argument("--options", nargs="+", metavar="TEXT", help="possible answers")
    about.add_argument("--task", choices=TASKS, help="default: choice if --options is given, else open")
    about.add_argument("--kind", metavar="NAME", help="kind of question, used to group tables")
    about.add_argument("--protocol", metavar="NAME", help="protocol of a synoptic case")
    about.add_argument("--root", metavar="FOLDER", help="base folder of relative paths in the manifest")
    cost = parser.add_argument_group("cost (--price or --budget)")
    cost.add_argument(
        "--price", type=float, metavar="LAMBDA", help="price of the largest budget, in units of the score"
    )
    cost.add_argument("--budget", type=int, metavar="TOKENS", help="fixed budget for every case; 0 shows no image")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object per case, then the means")
    out.add_argument("--out", metavar="FILE", help="also write the rows to this file, as JSON lines")
    return parser.parse_known_args(argv)


def check(args: argparse.Namespace, recipe: Sequence[str]) -> None:
    """Raise one InputError that lists all conflicting arguments."""
    single = bool(args.image or args.slide)
    problems = []
    if args.model is not None:
        if "--config" in recipe or "--output_dir" in recipe:
            problems.append("--model: the folder includes its recipe; remove --config and --output_dir")
        if args.split:
            problems.append("--split: a published run includes no cases; use --manifest")
        if not (args.model / MARK).is_file():
            problems.append(f"--model: {args.model} was not written by `frugalpath publish`")
    elif "--config" not in recipe:
        problems.append("--config: give the recipe that the run was trained with, or --model with a published run")
    if single + bool(args.manifest) + bool(args.split) != 1:
        problems.append("give exactly one of --image/--slide, --manifest and --split")
    if single and not (args.question or "").strip():
        problems.append("--question: missing; give the question about the image or slide")
    if args.split:
        idle = [k for k in ("question", "options", "task", "kind", "protocol") if getattr(args, k) is not None]
        problems += [f"--{k}: cases of --split have their own; remove it" for k in idle]
    if args.protocol is not None and args.manifest:
        problems.append("--protocol: not allowed with --manifest; set the manifest's column `protocol`")
    if args.root is not None and not args.manifest:
        problems.append("--root: only allowed with --manifest")
    if args.price is not None and args.budget is not None:
        problems.append("--price and --budget: give only one; a price lets the allocator choose, a budget is fixed")
    if args.price is not None and not (args.price >= 0 and math.isfinite(args.price)):
        problems.append(f"--price: expected a number of at least 0, got {args.price}")
    if problems:
        raise InputError(problems)


def check_budget(budget: int | None, ladder: Sequence[int]) -> None:
    """Raise InputError if the budget is outside the range that the performer was trained on."""
    if budget is not None and not 0 <= budget <= ladder[-1]:
        raise InputError(f"--budget: {budget} is outside 0..{ladder[-1]}, the largest budget of the run's ladder")


def cases_of(args: argparse.Namespace, run: Run) -> list[Case]:
    """Build the cases that the arguments describe."""
    if not args.manifest:
        about = {"task": args.task, "options": args.options, "question": args.kind or "", "protocol": args.protocol}
        return [new_case(args.image, args.slide, args.question, **about)]
    params = run.cases if run.cases["name"] == "manifest" else {}
    given = {"prompt": args.question, "options": args.options, "task": args.task, "question": args.kind}
    return read_new_cases(args.manifest, params, root=args.root, **given)


def prepare(args: argparse.Namespace, run: Run, stack: ExitStack) -> tuple[Allocator, Sequence[Case], Scorer | None]:
    """Load the run's allocator with the features of the cases, the cases, and a scorer if any have a gold answer."""
    if args.split:
        data = load_data(run)
        is_done(run.folder / "grpo", grpo_key(data))
        cases = data.splits[args.split]
        return deployed(run, cases, run.feature_folder), cases, data.scorer
    cases = cases_of(args, run)
    folder = feature_folder(run, stack)
    gold = [c for c in cases if c.answer.strip()]
    scorer = Scorer(load_rewards(run, gold), run.ladder[-1]) if gold else None
    return deployed(run, cases, folder), cases, scorer


def warn(messages: Iterable[str]) -> None:
    """Print warnings to standard error."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


@entry
def main() -> None:
    """Answer the cases and print each answer as soon as it is ready."""
    args, rest = parse(sys.argv[1:])
    check(args, rest)
    if args.model is not None:
        rest = ["--config", str(args.model / "recipe.yaml"), "--output_dir", str(args.model), *rest]
    run = parse_recipe(rest)
    if PartialState().num_processes > 1:
        raise InputError("cases are answered in one process: use `frugalpath answer`, not accelerate launch")
    check_finished(run)
    check_budget(args.budget, run.ladder)
    price = operating_price(run) if args.price is None and args.budget is None else args.price
    with ExitStack() as stack:
        allocator, cases, scorer = prepare(args, run, stack)
        if not args.split:
            known = evaluation(run)
            warn(dict.fromkeys(text for case in cases if (text := foreign(case, known))))
        rows = []
        if not args.json:
            print(head())
        answers = answer_all(allocator, cases, price=price, budget=args.budget, scorer=scorer)
        for case, row in zip(cases, answers, strict=True):
            rows.append(row)
            print(json.dumps(row) if args.json else line(row), flush=True)
            if problem := not_an_option(row, case):
                warn([f"{case.id}: {problem}"])
        if len(rows) > 1:
            found = {**({} if price is None else {"price": price}), **totals(rows)}
            print(json.dumps({"totals": found}) if args.json else closing(found))
    if args.out:
        write_text(args.out, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
