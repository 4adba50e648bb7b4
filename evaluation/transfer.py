"""Apply a trained run to the cases of another recipe, without fitting anything.

Performer, allocator, best static budget and operating price are those of the run, and so are its rewards and the
training answers of the majority control. Only `cases` (its test split; others may be empty) and `encoder` of the
other recipe are used.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import PartialState

from frugalpath.allocator.base import Allocator
from frugalpath.allocator.score_table import TableKey, score_table
from frugalpath.envs.case import Case
from frugalpath.envs.registry import make_env
from frugalpath.errors import InputError
from frugalpath.evaluation.cautions import warnings_of
from frugalpath.evaluation.report.pictures import Pictures
from frugalpath.evaluation.report.writing import missing_slides, provenance, write_outcome
from frugalpath.evaluation.run import Evaluator
from frugalpath.recipe.data import RunData, load_rewards, with_questions
from frugalpath.recipe.features import load_features
from frugalpath.recipe.run import Run, parse_recipe
from frugalpath.rewards.scoring import Scorer

logger = logging.getLogger(__name__)


def transfer(allocator: Allocator, recipe: Path) -> tuple[dict[str, Any], Path]:
    """Apply a finished run to the test cases of a recipe and write `transfer_<recipe>/` into the run's folder.

    Returns:
        The summary, and where it was written.

    Raises:
        InputError: the run is not finished, its allocator was not fitted; the recipe has no test case, the run was
            trained on some of them, their rewards or questions do not fit, or they are encoded otherwise.
    """
    data, performer = allocator.data, allocator.performer
    run, other = data.run, parse_recipe(["--config", str(recipe)])
    _check_encoder(run, other, recipe)
    cases = _test_cases(data, other, recipe)
    folder = run.folder / f"transfer_{recipe.stem}"
    tables = folder / "tables"
    bank = load_features(cases, other.encoder, other.feature_folder)
    data.bank.add(bank)  # after the run itself is read, which is known by the slides that it lacks
    evaluator = Evaluator(allocator)
    scorer = Scorer(load_rewards(run, cases), run.ladder[-1])
    table = score_table(
        performer,
        cases,
        [0, *run.ladder],
        scorer,
        data.max_new_tokens,
        run.evaluation.batch_size,
        tables / "grpo.test.jsonl",
        label=f"{recipe.stem} test",
        key=TableKey.of(data, allocator.trained.key, cases),
    )
    outcome = evaluator.on(cases, table, scorer, tables)
    shared = len({c.patient for c in cases} & {c.patient for s in ("train", "val") for c in data.all_splits[s]})
    if shared:
        logger.warning("%d test patients of %s are named as patients that the run learnt from", shared, recipe)
    summary = {
        **outcome.summary(),
        "warnings": warnings_of(outcome),
        "transfer": {"recipe": str(recipe), "shared_patients": shared},
        "missing_slides": missing_slides(cases, bank.missing),
        **provenance(data),
    }
    write_outcome(folder, outcome, summary, Pictures(performer, outcome.cases))
    return summary, folder


def _check_encoder(run: Run, other: Run, recipe: Path) -> None:
    """Raise InputError for features that the performer cannot read; only the tiling may differ."""
    kept = ("name", "revision")
    problems = [
        f"{recipe}: encoder.{key} is {theirs!r}, the run was trained on {ours!r}; set it to that"
        for key in kept
        if (ours := getattr(run.encoder, key)) != (theirs := getattr(other.encoder, key))
    ]
    if problems:
        raise InputError(problems)


def _test_cases(data: RunData, other: Run, recipe: Path) -> list[Case]:
    """Test cases of the other recipe, of the run's kinds of question."""
    params = {k: v for k, v in other.cases.items() if k != "name"}
    with PartialState().main_process_first():
        cases = [c for c in make_env(other.cases["name"], params, other.base) if c.split == "test"]
    if not cases:
        raise InputError(f"{recipe}: it has no case in split test, which is what a run is transferred to")
    cases = list(with_questions(cases, data.run.questions, f"{recipe}: questions of the run"))
    seen = {source for s in ("train", "val") for c in data.all_splits[s] for source in (*c.images, *c.slides)}
    learnt = [c for c in cases if seen & {*c.images, *c.slides}]
    if learnt:
        raise InputError(
            f"{recipe}: {len(learnt)} test cases show images or slides that the run was trained or fitted on, such as "
            f"case {learnt[0].id}; split them alike, or drop them"
        )
    return cases
