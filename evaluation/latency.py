"""Wall time of deciding and of answering, one case at a time; measured once and kept beside the score tables."""

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
"""Cases that are timed, spread over those that there are."""
KEPT = "latency.json"
"""File of the folder `tables`."""
WARM = 3
"""Of them, how many are answered beforehand without being timed, at every budget."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the timed cases at batch size 1; their images are read and encoded beforehand.

    Args:
        answer: of an answer at each budget, (T,). look: of deciding at each price, (T,).
    """

    answer: dict[int, np.ndarray]
    look: dict[float, np.ndarray]

    def budgets(self, ladder: Sequence[int]) -> np.ndarray:
        """Median (K,) of an answer."""
        return np.array([float(np.median(self.answer[b])) for b in ladder])

    def deciding(self, price: float) -> float:
        """Median of deciding."""
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
    """Time answers at every budget, and deciding at every price.

    Args:
        decisions: about these cases, one for each price. Deciding is timed once for prices at which it costs the same.
        before: times of these cases that are known already.
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
    """`measure`, of which what was measured before is read from the folder of the table.

    Times belong to a table's answers and to an allocator's settings; others are timed anew. So a second report has the
    same figures, whatever else the machine does at the time.

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
