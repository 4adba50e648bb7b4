"""Wall time of decisions and answers, one case at a time; measured once and stored with the score tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from frugalpath.allocator.base import Allocator, Decisions
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.distributed import is_main
from frugalpath.envs.case import Case
from frugalpath.files import write_text
from frugalpath.models.performer import Performer
from frugalpath.recipe.checkpoints import fingerprint

TIMED = 32
"""Maximum number of timed cases, spread over all cases."""
KEPT = "latency.json"
"""File in the folder `tables`."""
WARM = 3
"""Number of warm-up cases at every budget, which are not timed."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the timed cases at batch size 1; their images are read and encoded in advance.

    Args:
        answer: time per answer at each budget, (T,).
        look: time per decision at each price, (T,).
    """

    answer: dict[int, np.ndarray]
    look: dict[float, np.ndarray]

    def budgets(self, ladder: Sequence[int]) -> np.ndarray:
        """Median time (K,) of an answer."""
        return np.array([float(np.median(self.answer[b])) for b in ladder])

    def deciding(self, price: float) -> float:
        """Median time of a decision."""
        return float(np.median(self.look[price]))

    def to_dict(self, price: float) -> dict[str, Any]:
        """`answer` by budget and `look` at the operating price, each with median and quartiles."""
        answer = {str(b): _spread(t) for b, t in self.answer.items()}
        return {"cases": len(self.look[price]), "warm_up": WARM, "answer": answer, "look": _spread(self.look[price])}


def measure(
    performer: Performer,
    decider: Allocator,
    cases: Sequence[Case],
    decisions: Sequence[Decisions],
    max_new_tokens: int,
    before: Latency | None = None,
) -> Latency:
    """Time answers at every budget and decisions at every price.

    Args:
        decisions: about these cases, one for each price. Deciding is timed once for prices at which it costs the same.
        before: known times of these cases.
    """
    sample = list(cases[:: max(1, len(cases) // TIMED)][:TIMED])
    answer = dict(before.answer) if before else {}
    for budget in decider.ladder:
        if budget in answer:
            continue
        for case in sample:
            performer.prompt(case, budget)
        warm = sample[:WARM]
        performer.answer(warm, [budget] * len(warm), max_new_tokens, 1)
        answers = performer.answer(sample, [budget] * len(sample), max_new_tokens, 1)
        answer[budget] = 1000 * np.array([a.seconds for a in answers])
    look = dict(before.look) if before else {}
    by_cost = {float(d.look.mean()): look[d.price] for d in decisions if d.price in look}
    for decided in decisions:
        cost = float(decided.look.mean())
        if cost not in by_cost:
            decider.look_ms(sample[:WARM], decided.price)
            by_cost[cost] = decider.look_ms(sample, decided.price)
        look.setdefault(decided.price, by_cost[cost])
    return Latency(answer, look)


def measured_once(
    performer: Performer,
    decider: Allocator,
    cases: Sequence[Case],
    decisions: Sequence[Decisions],
    max_new_tokens: int,
    table: ScoreTable,
    folder: Path,
) -> Latency:
    """Like `measure`, but earlier times are read from the table's folder.

    Times belong to a table's answers and to an allocator's settings; others are timed anew. So a second report has the
    same figures, whatever else the machine is doing.

    Args:
        table: of these cases.
    """
    path = folder / KEPT
    answered = fingerprint({"ids": table.ids, "budgets": table.budgets, "text": table.text})
    chooses = fingerprint({"form": decider.form, "allocator": decider.data.run.allocator.settings()})
    kept = json.loads(path.read_text()) if path.is_file() else {}
    if kept.get("table") != answered:
        kept = {"table": answered, "answer": {}, "look": {}}
    found = measure(performer, decider, cases, decisions, max_new_tokens, _read(kept, chooses))
    content = {
        "table": answered,
        "answer": {str(budget): times.tolist() for budget, times in found.answer.items()},
        "look": {**kept["look"], chooses: [[price, times.tolist()] for price, times in found.look.items()]},
    }
    # All processes have read it before one of them writes: those that found other times would do other work.
    PartialState().wait_for_everyone()
    if is_main() and content != kept:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content) + "\n")
    return found


def _read(kept: dict[str, Any], chooses: str) -> Latency:
    return Latency(
        {int(budget): np.array(times) for budget, times in kept["answer"].items()},
        {price: np.array(times) for price, times in kept["look"].get(chooses, [])},
    )


def _spread(times: np.ndarray) -> dict[str, Any]:
    low, middle, high = (float(q) for q in np.quantile(times, [0.25, 0.5, 0.75]))
    return {"median_ms": middle, "quartiles_ms": [low, high]}
