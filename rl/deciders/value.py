"""The form `value`: predicted scores from the cheapest look, minus price times cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.look import CheapLook
from models.allocators.value import ValueAllocator
from models.performer import Performer
from rl.allocation.fitting import fit_by_patient, predict
from rl.checkpoints import is_done, mark_done
from rl.deciders.base import Decider, Decisions
from rl.stages import Stages

TIMED = 16
"""Test cases that deciding is timed on."""


class ValueDecider(Decider):
    """A fitted value allocator.

    Args:
        stages: the run. performer: its trained performer. allocator: fitted on the validation cases.
        held_out: (N, rungs) predicted scores of the validation cases, each by a fit that had not seen the patient.
    """

    form = "value"

    def __init__(self, stages: Stages, performer: Performer, allocator: ValueAllocator, held_out: np.ndarray):
        self.stages, self.performer, self.allocator, self.held_out = stages, performer, allocator, held_out
        self.ladder = stages.run.ladder
        self.look = CheapLook(performer, allocator.config)
        self.rung_cost = np.array(stages.rung_cost(performer))

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        test = predict(self.allocator, *self.look(self.stages.splits["test"]))
        return {"val": self.held_out, "test": test}

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        values = predict(self.allocator, *self.look(cases))
        return (values - price * self.rung_cost).argmax(1), self._look_flops(cases)

    def predicted(self, split: str) -> np.ndarray:
        return self._values[split]

    def decide(self, split: str, price: float) -> Decisions:
        table = self.stages.table("grpo", self.performer, split).at(self.ladder)
        rungs = (self._values[split] - price * self.rung_cost).argmax(1)
        return Decisions.from_table(price, table, rungs, self._look_flops(self.stages.splits[split]))

    def share_look(self) -> np.ndarray:
        return super().share_look() if self.allocator.shares is None else self._look_flops(self.stages.splits["test"])

    def _look_flops(self, cases: Sequence[Case]) -> np.ndarray:
        return np.array([self.allocator.flops(len(self.performer.sources(c))) for c in cases])

    def look_ms(self) -> float:
        times = []
        for case in self.stages.splits["test"][:TIMED]:
            start = time.perf_counter()
            predict(self.allocator, *self.look([case]))
            times.append(1000 * (time.perf_counter() - start))
        return float(np.median(times))


def fit_value(stages: Stages, performer: Performer, start: ValueAllocator, table: ScoreTable) -> ValueDecider:
    """Fit on a table, starting from the jointly trained allocator; a finished fit is read from the run's folder."""
    options = stages.run.allocator
    folder = stages.run.folder / "allocator"
    parts = {**stages.grpo_parts(), "fit": vars(options)}
    if is_done(folder, parts):
        held_out = np.load(folder / "out_of_fold.npy")
        return ValueDecider(stages, performer, ValueAllocator.from_pretrained(folder), held_out)
    cases = stages.splits["val"]
    look, question = CheapLook(performer, start.config)(cases)
    scores = torch.tensor(table.at(stages.run.ladder).score, dtype=torch.float32)
    allocator, values, losses = fit_by_patient(
        start,
        look,
        question,
        scores,
        [c.patient for c in cases],
        epochs=options.fit_epochs,
        learning_rate=options.fit_learning_rate,
        weight_decay=options.weight_decay,
        seed=stages.run.grpo.seed,
    )
    if stages.is_main:
        allocator.save_pretrained(folder)
        np.save(folder / "out_of_fold.npy", values)
        mark_done(folder, parts, n=len(cases), loss=losses)
    return ValueDecider(stages, performer, allocator, values)
