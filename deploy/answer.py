"""Answer a case, or many, with a finished run, at a price or at a fixed budget.

    python deploy/answer.py --config RECIPE --image field.png --question "Is this metastasis?" --options normal metastasis
    python deploy/answer.py --config RECIPE --slide a.svs b.svs --question "What is the diagnosis?" --budget 16
    python deploy/answer.py --config RECIPE --manifest new.jsonl --price 0.1 --json --out answers.jsonl
    python deploy/answer.py --config RECIPE --split test
    python deploy/answer.py --model FOLDER --image field.png --question "Does this show metastasis?"

Only the recipe and the run's folders `grpo`, `allocator` and `report` are needed, except for `--split`. Without
--price and --budget the price is the one that the report chose. Both stages are shown: the look that chooses a budget,
and the answer. Features are read from the run's feature folder and added to it; where it is not there or may not be
written, they are made anew in a temporary one. docs/pareto.md says how to choose a price and what to deploy.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import PartialState

from frugalpath.allocator.base import Allocator
from frugalpath.deploy.run import answer_all, closing, deployed, head, line, not_an_option, totals
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
    """Own arguments, and those of the recipe."""
    # The name of the recipe's parser would show in its help; abbreviations could be keys of the recipe.
    parser = argparse.ArgumentParser(
        prog="python deploy/answer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other arguments are the recipe's: --config, --set section.key=value, --output_dir RUN ...",
    )
    what = parser.add_argument_group("what to answer, one of three")
    what.add_argument("--image", nargs="+", default=[], metavar="FILE", help="fields of view of one case")
    what.add_argument("--slide", nargs="+", default=[], metavar="FILE", help="slides or .h5 feature files of one case")
    what.add_argument("--manifest", metavar="FILE", help="many cases, see docs/data.md; gold answers may be missing")
    what.add_argument("--split", choices=("val", "test"), help="the recipe's own; the allocator was fitted on val")
    what.add_argument(
        "--model", type=Path, metavar="FOLDER", help="written by deploy/publish.py, in place of --config"
    )
    about = parser.add_argument_group("the question (of a manifest: for rows that do not say)")
    about.add_argument("--question", metavar="TEXT", help="as the performer is asked")
    about.add_argument("--options", nargs="+", metavar="TEXT", help="possible answers")
    about.add_argument("--task", choices=TASKS, help="by default choice where there are options, else open")
    about.add_argument("--kind", metavar="NAME", help="kind of question, for tables")
    about.add_argument("--protocol", metavar="NAME", help="of a synoptic case")
    about.add_argument("--root", metavar="FOLDER", help="where relative paths of a manifest start")
    cost = parser.add_argument_group("what it may cost")
    cost.add_argument("--price", type=float, metavar="LAMBDA", help="score per cost of the largest budget")
    cost.add_argument("--budget", type=int, metavar="TOKENS", help="the same for every case, 0 shows no image")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="a JSON object a case, the means of several at the end")
    out.add_argument("--out", metavar="FILE", help="also write the rows there, as JSON lines")
    return parser.parse_known_args(argv)


def check(args: argparse.Namespace, recipe: Sequence[str]) -> None:
    """Refuse arguments that do not go together, all at once."""
    single = bool(args.image or args.slide)
    problems = []
    if args.model is not None:
        if "--config" in recipe or "--output_dir" in recipe:
            problems.append("--model: has its recipe with it; leave out --config and --output_dir")
        if args.split:
            problems.append("--split: a published run has no cases; name a manifest")
        if not (args.model / MARK).is_file():
            problems.append(f"--model: {args.model} was not written by deploy/publish.py")
    elif "--config" not in recipe:
        problems.append("--config: name the recipe that the run was trained by, or --model a published one")
    if single + bool(args.manifest) + bool(args.split) != 1:
        problems.append("say what to answer by one of --image/--slide, --manifest and --split")
    if single and not (args.question or "").strip():
        problems.append("--question: say what is asked of the image or slide")
    if args.split:
        idle = [k for k in ("question", "options", "task", "kind", "protocol") if getattr(args, k) is not None]
        problems += [f"--{k}: the cases of --split have their own; leave it out" for k in idle]
    if args.protocol is not None and args.manifest:
        problems.append("--protocol: write it into the manifest, in the column `protocol`")
    if args.root is not None and not args.manifest:
        problems.append("--root: belongs to --manifest")
    if args.price is not None and args.budget is not None:
        problems.append("--price and --budget: the allocator chooses at a price, a budget leaves no choice; give one")
    if args.price is not None and not (args.price >= 0 and math.isfinite(args.price)):
        problems.append(f"--price: {args.price} must be 0 or more")
    if problems:
        raise InputError(problems)


def check_budget(budget: int | None, ladder: Sequence[int]) -> None:
    """Refuse a budget that the performer was not trained at."""
    if budget is not None and not 0 <= budget <= ladder[-1]:
        raise InputError(f"--budget: {budget} must be in 0..{ladder[-1]}, the largest budget of the run's ladder")


def cases_of(args: argparse.Namespace, run: Run) -> list[Case]:
    """The new cases that are asked about."""
    if not args.manifest:
        about = {"task": args.task, "options": args.options, "question": args.kind or "", "protocol": args.protocol}
        return [new_case(args.image, args.slide, args.question, **about)]
    params = run.cases if run.cases["name"] == "manifest" else {}
    given = {"prompt": args.question, "options": args.options, "task": args.task, "question": args.kind}
    return read_new_cases(args.manifest, params, root=args.root, **given)


def prepare(args: argparse.Namespace, run: Run, stack: ExitStack) -> tuple[Allocator, Sequence[Case], Scorer | None]:
    """The run's allocator, with the cases' features; the cases, and what scores those with a gold answer."""
    if args.split:
        data = load_data(run)
        is_done(run.folder / "grpo", grpo_key(data))
        cases = data.splits[args.split]
        return deployed(run, cases, run.feature_folder), cases, data.scorer
    cases = cases_of(args, run)
    folder = run.feature_folder
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="features-")))
    gold = [c for c in cases if c.answer.strip()]
    scorer = Scorer(load_rewards(run, gold), run.ladder[-1]) if gold else None
    return deployed(run, cases, folder), cases, scorer


def warn(messages: Iterable[str]) -> None:
    """Tell on standard error, which leaves the rows alone."""
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


@entry
def main() -> None:
    """Answer, and print each answer as it comes."""
    args, rest = parse(sys.argv[1:])
    check(args, rest)
    if args.model is not None:
        rest = ["--config", str(args.model / "recipe.yaml"), "--output_dir", str(args.model), *rest]
    run = parse_recipe(rest)
    if PartialState().num_processes > 1:
        raise InputError(
            "cases are answered one by one: start deploy/answer.py with python, not with accelerate launch"
        )
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
