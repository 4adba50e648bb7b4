"""What must be there of a run before it answers, and what its report says of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from frugalpath.errors import InputError, removed
from frugalpath.recipe.checkpoints import DONE
from frugalpath.recipe.file import FORMER_FORMS
from frugalpath.recipe.run import FORMS, Run

FITTED = "decider.json"
"""File of the folder `allocator` with what deciding takes that the network's own files do not hold."""
TRAINED = f"grpo/{DONE}"
NEEDED = {TRAINED: "grpo", f"allocator/{FITTED}": "pareto"}
"""Last file of each part that answering takes, and what writes it."""
SUMMARY = "report/summary.json"
MARK = "frugalpath.json"
"""File that makes a folder a published run, with the settings that it was trained by; see `deploy.publishing`."""
EVALUATION = "evaluation.json"
"""What a published run has of its report."""


def settings(run: Run) -> dict[str, Any]:
    """What the trained weights can only be used with."""
    return {"encoder": vars(run.encoder), "performer": dataclasses.asdict(run.performer), "ladder": run.ladder}


def check_finished(run: Run, allocator: bool = True) -> None:
    """Refuse a run that has no trained performer and fitted allocator, or that other settings have made or reported.

    Args:
        allocator: whether it is to be there; otherwise the performer is enough.

    Raises:
        InputError: with what is missing and what writes it, or what differs.
    """
    if (run.folder / MARK).is_file():
        _check_settings(run, json.loads((run.folder / MARK).read_text())["parts"])
    else:
        _check_files(run, NEEDED if allocator else {TRAINED: NEEDED[TRAINED]})
        _check_settings(run, json.loads((run.folder / "grpo" / DONE).read_text())["parts"])
    if allocator:
        kept_form(run)


def kept_form(run: Run) -> str:
    """The form that a run's last report was made with, and that its recipe names.

    Raises:
        InputError: this version does not know it, or the recipe names another.
    """
    path = run.folder / "allocator" / FITTED
    form = json.loads(path.read_text())["form"]
    form = FORMER_FORMS.get(form, form)
    if form == "split":
        raise InputError(removed(f"{path}: form 'split'", "train again without allocator.share, in a new folder"))
    if form not in FORMS:
        raise InputError(f"{path}: the form {form!r} is unknown; use one of {', '.join(FORMS)}")
    if form != run.allocator.form:
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{path}: the last report was made with allocator.form {form}, the recipe has {run.allocator.form}; give "
            f"--set allocator.form={form}, or make the report with the other: frugalpath pareto {recipe}"
        )
    return form


def check_trained(run: Run) -> None:
    """Refuse a run whose training is not finished, which its report does not do for it.

    Raises:
        InputError: with what is missing and what writes it.
    """
    _check_files(run, {TRAINED: NEEDED[TRAINED]})


def _check_files(run: Run, needed: Mapping[str, str]) -> None:
    missing = {name: script for name, script in needed.items() if not (run.folder / name).is_file()}
    if missing:
        script = NEEDED[TRAINED] if TRAINED in missing else next(iter(missing.values()))
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{run.folder}: the run is not finished, it has no {', '.join(missing)}; run: frugalpath {script} {recipe}"
        )


def _check_settings(run: Run, kept: dict[str, Any]) -> None:
    changed = [name for key, value in settings(run).items() for name in _differing(key, kept[key], value)]
    if changed:
        raise InputError(
            f"{run.folder}: was trained with other settings ({', '.join(changed)}); answer with the recipe it was "
            "trained by"
        )


def evaluation(run: Run) -> dict[str, Any]:
    """What the run's report, or a published run, tells of it; empty where there is no report."""
    path = run.folder / (EVALUATION if (run.folder / MARK).is_file() else SUMMARY)
    return json.loads(path.read_text()) if path.is_file() else {}


def operating_price(run: Run) -> float:
    """The price that the run's report chose.

    Raises:
        InputError: there is no report.
    """
    found = evaluation(run)
    if not found:
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{run.folder / SUMMARY}: there is no report to take the price from; give --price or --budget, or run: "
            f"frugalpath pareto {recipe}"
        )
    return found["headline"]["price"]


def _differing(key: str, before: Any, now: Any) -> list[str]:
    """Keys of a part of the recipe that are not as they were; where features lie does not matter."""
    if not isinstance(before, dict):
        return [key] if before != json.loads(json.dumps(now)) else []
    same = json.loads(json.dumps(now))
    return [f"{key}.{k}" for k in before if k not in ("folder", "strict") and same.get(k) != before[k]]
