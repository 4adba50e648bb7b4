"""A finished run that meets new cases: nothing is trained, and the recipe's own cases need not be there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.case import Case
from models.performer import Performer
from rl.checkpoints import DONE
from rl.deciders.base import Decider
from rl.deciders.loading import KEPT, kept_form, load_decider
from rl.prepare import load_features
from rl.recipe import Run
from rl.stages import Stages
from slides.errors import InputError

TRAINED = f"grpo/{DONE}"
NEEDED = {TRAINED: "rl/grpo.py", f"allocator/{KEPT}": "rl/pareto.py"}
"""Last file of each part that answering takes, and what writes it."""
SUMMARY = "report/summary.json"
MARK = "frugalpath.json"
"""File that makes a folder a published run, with the settings that it was trained by; see `rl.publishing`."""
EVALUATION = "evaluation.json"
"""What a published run has of its report."""


class Deployed(Stages):
    """A finished run and new cases.

    Args:
        run: the parsed recipe.
        cases: to be answered, at least one.
        features: folder that features are read from and written to.

    Raises:
        InputError: the run is not finished, or the recipe is not the one it was made by.
    """

    # Not that of `Stages`, which loads the recipe's cases and rewards.
    def __init__(self, run: Run, cases: Sequence[Case], features: Path):
        check_finished(run)
        self.run, self.cases = run, list(cases)
        self.all_splits = self.splits = {"train": [], "val": [], "test": []}
        self.max_new_tokens = run.evaluation.max_new_tokens or run.grpo.max_completion_length
        self.bank = load_features(self.cases, run.encoder, features)
        self.features = features

    def show(self, cases: Sequence[Case]) -> None:
        """Make further cases known, which a decider that is loaded already can then answer."""
        self.bank.add(load_features(cases, self.run.encoder, self.features))

    def rung_cost(self, performer: Performer) -> list[float]:
        """As it was when the allocator was fitted."""
        return json.loads((self.run.folder / "allocator" / KEPT).read_text())["rung_cost"]

    def decider(self) -> Decider:
        """Performer and allocator, ready to answer."""
        return load_decider(self, self._load("grpo"))

    def _load(self, name: str) -> Performer:
        # A published run has the performer at its top, where `from_pretrained` looks for it.
        return super()._load("" if (self.run.folder / MARK).is_file() else name)


def settings(run: Run) -> dict[str, Any]:
    """What the trained weights can only be used with."""
    return {"encoder": vars(run.encoder), "performer": dataclasses.asdict(run.performer), "ladder": run.ladder}


def check_finished(run: Run) -> None:
    """Refuse a run that has no trained performer and fitted allocator, or that other settings have made or reported.

    Raises:
        InputError: with what is missing and what writes it, or what differs.
    """
    if (run.folder / MARK).is_file():
        _check_settings(run, json.loads((run.folder / MARK).read_text())["parts"])
    else:
        _check_files(run, NEEDED)
        _check_settings(run, json.loads((run.folder / "grpo" / DONE).read_text())["parts"])
    kept_form(run)


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
            f"{run.folder}: the run is not finished, it has no {', '.join(missing)}; run: python {script} {recipe}"
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
            f"python rl/pareto.py {recipe}"
        )
    return found["headline"]["price"]


def _differing(key: str, before: Any, now: Any) -> list[str]:
    """Keys of a part of the recipe that are not as they were; where features lie does not matter."""
    if not isinstance(before, dict):
        return [key] if before != json.loads(json.dumps(now)) else []
    same = json.loads(json.dumps(now))
    return [f"{key}.{k}" for k in before if k not in ("folder", "strict") and same.get(k) != before[k]]
