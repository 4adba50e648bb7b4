"""Fitted allocators in a run's folder: what is kept beside them, and reading them for new cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from frugalpath.allocator.base import Allocator, TrainedRun
from frugalpath.allocator.cascade import load_cascade
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.policy import load_policy
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.allocator.text import load_text
from frugalpath.allocator.value import load_value
from frugalpath.distributed import is_main
from frugalpath.files import write_text
from frugalpath.models.performer import Performer
from frugalpath.recipe.data import RunData
from frugalpath.recipe.finished import FITTED, kept_form

LOADERS: dict[str, Callable[[TrainedRun], Allocator]] = {
    "value": load_value,
    "policy": load_policy,
    "text": load_text,
    "cascade": load_cascade,
}
"""How each form is read from the folder `allocator` of a run."""


def keep_allocator(allocator: Allocator) -> None:
    """Write the form, and the cost of the budgets, which is measured on training questions.

    It goes with the report, whose prices are of this form.
    """
    if is_main():
        content = {"form": allocator.form, "ladder": allocator.ladder, "rung_cost": list(allocator.objective.cost)}
        path = allocator.data.run.folder / "allocator" / FITTED
        write_text(path, json.dumps(content, indent=1) + "\n")


def load_allocator(
    data: RunData,
    performer: Performer,
    tables: Mapping[str, ScoreTable] | None = None,
    key: Mapping[str, Any] | None = None,
) -> Allocator:
    """The allocator that a run's last report was made with; nothing is fitted.

    Args:
        tables: the performer's, where it is to decide about the run's own cases again.
        key: of the joint stage, where the fit is to be checked against the recipe.

    Raises:
        InputError: as `kept_form`, or other settings were fitted.
    """
    run, options = data.run, data.run.allocator
    form = kept_form(run)
    kept = json.loads((run.folder / "allocator" / FITTED).read_text())
    objective = Objective(options.objective, tuple(run.ladder), tuple(kept["rung_cost"]), options.target)
    return LOADERS[form](TrainedRun(data, performer, objective, tables or {}, key or {}))
