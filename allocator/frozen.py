"""The allocator learns from a frozen performer: the second part of the mode `sequential` (BiRR4CPath, methods 1.2).

The performer answers greedily, as published (methods 1.5), so that a score is a function of case and budget: each is
asked for once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from frugalpath.allocator.online import AllocatorLearner
from frugalpath.distributed import map_over_processes
from frugalpath.envs.case import Case
from frugalpath.files import write_text
from frugalpath.models.performer import Answer, Performer
from frugalpath.recipe.checkpoints import Clock
from frugalpath.rewards.scoring import Scorer

STATE = "state.json"


@dataclass(frozen=True)
class Scored:
    """A greedy answer and its score in 0..1."""

    score: float
    answer: Answer


class FrozenAnswers:
    """Greedy answers of a frozen performer, each made once for a case and a budget.

    Args:
        batch_size: rows of one generation batch.
    """

    def __init__(self, performer: Performer, scorer: Scorer, max_new_tokens: int, batch_size: int = 128):
        self.performer, self.scorer = performer, scorer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.known: dict[tuple[str, int], Scored] = {}
        self.flops = 0.0
        """Of the answers that were made."""

    def __call__(self, cases: Sequence[Case], budgets: Sequence[int], together: bool = False) -> list[Scored]:
        """Answers of the cases, each at its own budget (0 shows no image).

        Args:
            together: every process asks for the same, so that they share the work.
        """
        rows = list(zip(cases, budgets, strict=True))
        keys = [(case.id, budget) for case, budget in rows]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        asked = [rows[keys.index(key)] for key in new]
        found = map_over_processes(asked, self._answer) if together else self._answer(asked)
        self.flops += sum(scored.answer.flops for scored in found)
        self.known.update(zip(new, found, strict=True))
        return [self.known[key] for key in keys]

    def _answer(self, rows: list[tuple[Case, int]]) -> list[Scored]:
        if not rows:
            return []
        cases, budgets = (list(column) for column in zip(*rows, strict=True))
        answers = self.performer.answer(cases, budgets, self.max_new_tokens, self.batch_size)
        scores = self.scorer([a.text for a in answers], cases, budgets, [a.visual for a in answers])
        return [Scored(float(score), answer) for score, answer in zip(scores, answers, strict=True)]

    def save(self, path: Path) -> None:
        """Write what is known, one answer a line."""
        lines = [json.dumps([key, scored.score, asdict(scored.answer)]) for key, scored in self.known.items()]
        write_text(path, "".join(f"{line}\n" for line in lines))

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        for line in path.read_text().splitlines():
            (name, budget), score, answer = json.loads(line)
            self.known[name, budget] = Scored(score, Answer(**answer))


@dataclass(frozen=True)
class Plan:
    """How long and in what steps an allocator learns from a frozen performer.

    Args:
        steps: updates. images: of a step. budgets: drawn for each image.
        seed: of the order of the images, of draws and of dropout.
        save_steps, log_steps: between two checkpoints and two rows of the log.
    """

    steps: int
    images: int
    budgets: int
    seed: int
    save_steps: int
    log_steps: int


def learn_from_frozen(
    learner: AllocatorLearner,
    answers: FrozenAnswers,
    cases: Sequence[Case],
    plan: Plan,
    folder: Path,
    resumed: str | None,
    clock: Clock,
    logged: Callable[[int, dict[str, float]], None],
) -> list[dict[str, Any]]:
    """Train the learner's allocator in place on answers at the budgets that it draws; returns the log.

    Args:
        folder: of the checkpoints; the newest is kept. resumed: the one to go on from.
        logged: called with the step and the metrics of every row of the log, those before the resume with them.
    """
    log: list[dict[str, Any]] = []
    first = 0
    if resumed:
        state = json.loads((Path(resumed) / STATE).read_text())
        first, log, answers.flops = state["step"], state["log"], state["flops"]
        learner.load(resumed)
        answers.load(Path(resumed) / "answers.jsonl")
    for row in log:
        logged(row["step"], row)
    main = PartialState().is_main_process
    for step in tqdm(range(first, plan.steps), "allocator", plan.steps, initial=first, disable=not main, unit="step"):
        # Every step has a seed of its own, so that a resumed run and every process draw the same.
        torch.manual_seed(1_000_003 * plan.seed + step)
        batch = [cases[i] for i in _batch(len(cases), plan.images, step, plan.seed)]
        drawn = learner.draw(batch, plan.budgets)
        budgets = [learner.ladder[rung] for rung in drawn.rungs.flatten().tolist()]
        repeated = [case for case in batch for _ in range(plan.budgets)]
        scored = answers(repeated, budgets, together=True)
        score = torch.tensor([s.score for s in scored], dtype=torch.float32).view(drawn.rungs.shape)
        epoch = step * plan.images / len(cases)
        metrics = learner.update(drawn.look, drawn.question, drawn.rungs, score, drawn.price, epoch)
        if (step + 1) % plan.log_steps == 0 or step + 1 == plan.steps:
            row = {"step": step + 1, **{f"allocator/{name}": value for name, value in metrics.items()}}
            log.append(row)
            logged(step + 1, row)
        if main and (step + 1) % plan.save_steps == 0:
            _save(folder, step + 1, learner, answers, log, clock)
    return log


def _save(
    folder: Path, step: int, learner: AllocatorLearner, answers: FrozenAnswers, log: list[dict[str, Any]], clock: Clock
) -> None:
    """Write a checkpoint, then drop the earlier ones."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    learner.save(checkpoint)
    answers.save(checkpoint / "answers.jsonl")
    write_text(checkpoint / STATE, json.dumps({"step": step, "flops": answers.flops, "log": log}))
    clock.mark(checkpoint)
    for old in folder.glob("checkpoint-*"):
        if old != checkpoint:
            shutil.rmtree(old)


def _batch(count: int, size: int, step: int, seed: int) -> list[int]:
    """Cases of a step: all of them in an order, then in another, and so on."""
    places = [divmod(at, count) for at in range(step * size, (step + 1) * size)]
    return [_order(count, seed + epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
