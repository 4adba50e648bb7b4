"""Fitted allocators in a run's folder: what is kept beside them, and reading them for new cases."""

from __future__ import annotations

import json
from collections.abc import Callable

from frugalpath.allocator.base import Decider
from frugalpath.allocator.cascade import load_escalate
from frugalpath.allocator.fitting import fit_parts
from frugalpath.allocator.policy import load_policy
from frugalpath.allocator.text import load_text
from frugalpath.allocator.value import load_value
from frugalpath.errors import InputError, removed
from frugalpath.files import write_text
from frugalpath.models.performer import Performer
from frugalpath.recipe.checkpoints import is_done
from frugalpath.recipe.run import Run
from frugalpath.rl.stages import Stages
from frugalpath.rl.text_allocator import text_parts

KEPT = "decider.json"
"""File of the folder `allocator` with what deciding takes that the network's own files do not hold."""

LOADERS: dict[str, Callable[[Stages, Performer], Decider]] = {
    "value": load_value,
    "policy": load_policy,
    "text": load_text,
    "escalate": load_escalate,
}
"""How each form is read from the folder `allocator` of a run."""


def keep_decider(decider: Decider) -> None:
    """Write the form, and the cost of the budgets, which is measured on training questions.

    It goes with the report, whose prices are of this form.
    """
    stages = decider.stages
    path = stages.run.folder / "allocator" / KEPT
    if stages.is_main:
        content = {"form": decider.form, "ladder": decider.ladder, "rung_cost": list(decider.rung_cost)}
        write_text(path, json.dumps(content, indent=1) + "\n")


def kept_form(run: Run) -> str:
    """The form that a run's last report was made with, and that its recipe names.

    Raises:
        InputError: this version does not know it, or the recipe names another.
    """
    path = run.folder / "allocator" / KEPT
    form = json.loads(path.read_text())["form"]
    if form == "split":
        raise InputError(removed(f"{path}: form 'split'", "train again without allocator.share, in a new folder"))
    if form not in LOADERS:
        raise InputError(f"{path}: the form {form!r} is not known; known are {', '.join(LOADERS)}")
    if form != run.allocator.form:
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{path}: the last report was made with allocator.form {form}, the recipe has {run.allocator.form}; give "
            f"--set allocator.form={form}, or make the report with the other: python rl/pareto.py {recipe}"
        )
    return form


def load_decider(stages: Stages, performer: Performer) -> Decider:
    """The fitted allocator of a run.

    Raises:
        InputError: as `kept_form`.
    """
    return LOADERS[kept_form(stages.run)](stages, performer)


def check_fitted(stages: Stages) -> None:
    """Refuse a run whose allocator is not the one that its recipe asks for.

    Raises:
        InputError: as `kept_form`, it was never fitted, or other settings were.
    """
    run = stages.run
    if not (run.folder / "allocator" / KEPT).is_file():
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{run.folder}: its allocator was never fitted, or never reported on; run: python rl/pareto.py {recipe}"
        )
    form = kept_form(run)
    if form == "text":
        is_done(run.folder / "text", text_parts(stages))
    elif form != "escalate":
        is_done(run.folder / "allocator", fit_parts(stages))
