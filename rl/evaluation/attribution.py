"""To which stage the gain is due: the performer before training, after SFT, after SFT continued, after GRPO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.score_table import ScoreTable
from rewards.bootstrap import Bootstrap
from rl.frontier.points import Point, point
from rl.stages import Stages


@dataclass(frozen=True)
class Attribution:
    """Of each stage: its point, and for those that were trained the scores (N,) and completions on the test cases."""

    points: dict[str, Point]
    scores: dict[str, np.ndarray]
    texts: dict[str, list[str]]


def best_static(table: ScoreTable) -> int:
    """Rung of the most accurate budget of a table; the cheaper one of equals."""
    return int(np.argmax(table.score.mean(0)))


def attribute(stages: Stages, trained: dict[str, ScoreTable], bootstrap: Bootstrap) -> Attribution:
    """Every stage at the static budget that its validation table prefers; the untrained performer at the largest.

    Args:
        trained: tables of the performer after GRPO, `val` and `test`. bootstrap: over the test cases.
    """
    ladder, names = stages.run.ladder, ["sft"]
    if stages.run.evaluation.sft_continued and stages.run.sft:
        names.append("sft_continued")
    base = stages.table("base", stages.base(), "test", [ladder[-1]])
    found = Attribution({"base": _point(base, bootstrap)}, {}, {})
    for name in [*names, "grpo"]:
        tables = trained
        if name != "grpo":
            performer = stages.warm_start() if name == "sft" else stages.sft_continued()
            tables = {s: stages.table(name, performer, s, ladder) for s in ("val", "test")}
        table = tables["test"].at([ladder[best_static(tables["val"].at(ladder))]])
        found.points[name] = _point(table, bootstrap)
        found.scores[name] = table.score[:, 0]
        found.texts[name] = [row[0] for row in table.text]
    return found


def _point(table: ScoreTable, bootstrap: Bootstrap) -> Point:
    """The point of a table of one budget."""
    return point(table.score[:, 0], table.visual[:, 0], table.flops[:, 0], bootstrap, budget=table.budgets[0])
