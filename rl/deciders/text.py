"""The form `text`: an adapter of the performer writes a budget, and the performer answers at that very one."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from envs.case import Case
from models.allocators.text import Asked, TextAllocator
from models.performer import Performer
from rl.allocation.frozen import FrozenAnswers
from rl.allocation.text import read_text, train_text
from rl.deciders.base import Answered, Decider, Decisions
from rl.processes import shared_out
from rl.stages import Stages
from slides.whole import write_text

UNREADABLE = 0.1
"""Share of completions without a budget that is warned of."""


class TextDecider(Decider):
    """A trained adapter. It knows no price, so that it has one operating point.

    Args:
        stages: the run. performer: its trained performer. allocator: trained on the training cases.
    """

    form = "text"
    folder = "text"

    def __init__(self, stages: Stages, performer: Performer, allocator: TextAllocator):
        self.stages, self.performer, self.allocator = stages, performer, allocator
        self.ladder = stages.run.ladder
        own = stages.run.allocator.text.grpo
        self.tokens: Any = own.get("max_completion_length", stages.max_new_tokens)
        self._found: dict[str, list[dict[str, Any]]] = {}

    def prices(self, asked: Sequence[float]) -> list[float]:
        return list(asked[:1])

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        asked = self._ask(cases)
        return self._nearest([a.budget for a in asked]), np.array([a.flops for a in asked])

    def decide(self, split: str, price: float) -> Decisions:
        rows = self._rows(split)
        score, visual, flops, look = (
            np.array([float(row[k]) for row in rows]) for k in ("score", "visual", "flops", "look")
        )
        details = [
            {
                "asked": row["asked"],
                "budget": row["budget"],
                "completion": row["text"],
                "prompt_tokens": row["prompt"],
                "generated_tokens": row["generated"],
            }
            for row in rows
        ]
        rungs = self._nearest([r["budget"] for r in rows])
        return Decisions(price, rungs, score, visual, flops, look, self._look_tokens(split), details)

    def _look_tokens(self, split: str) -> np.ndarray:
        return np.array([float(self.allocator.prompt(c).visual) for c in self.stages.splits[split]])

    def answer(self, case: Case, price: float) -> Answered:
        start = time.perf_counter()
        (asked,) = self._ask([case])
        return self._answered(case, asked.budget, asked.flops, start)

    def warnings(self) -> list[str]:
        rows = self._rows("val")
        lost = sum(row["number"] is None for row in rows) / len(rows)
        if lost <= UNREADABLE:
            return []
        return [
            f"the allocator writes no budget for {lost:.0%} of the validation cases, which then get "
            f"{self.allocator.default} tokens; teach it first: allocator.text.warm_start"
        ]

    def _ask(self, cases: Sequence[Case]) -> list[Asked]:
        return self.allocator.ask(cases, self.tokens, self.stages.run.evaluation.batch_size)

    def _nearest(self, budgets: Sequence[int]) -> np.ndarray:
        """Rungs (N,) of the ladder nearest to the budgets, by doublings."""
        asked, ladder = np.log2(np.maximum(budgets, 1)), np.log2(self.ladder)
        return abs(asked[:, None] - ladder).argmin(1)

    def _rows(self, split: str) -> list[dict[str, Any]]:
        """What was asked for, answered and paid for every case of a split; kept beside the adapter."""
        if split in self._found:
            return self._found[split]
        path = self.stages.run.folder / "text" / f"{split}.jsonl"
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            cases, run = self.stages.splits[split], self.stages.run
            answers = FrozenAnswers(
                self.performer, self.stages.scorer, self.stages.max_new_tokens, run.evaluation.batch_size
            )
            asked = shared_out(cases, self._ask)
            scored = answers(cases, [a.budget for a in asked], together=True)
            rows = [
                {"id": c.id, "asked": a.text, "number": a.number, "budget": a.budget, "look": a.flops}
                | {"score": s.score, **asdict(s.answer)}
                for c, a, s in zip(cases, asked, scored, strict=True)
            ]
            if self.stages.is_main:
                write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
        self._found[split] = rows
        return rows


def text_decider(stages: Stages, performer: Performer) -> TextDecider:
    """Train the adapter, or read it from the run's folder."""
    return TextDecider(stages, performer, train_text(stages, performer))


def load_text(stages: Stages, performer: Performer) -> TextDecider:
    """Read the trained adapter from the run's folder."""
    return TextDecider(stages, performer, read_text(stages, performer))
