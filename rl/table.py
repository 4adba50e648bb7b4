"""Makes the score table of a frozen performer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from envs.case import Case
from envs.score_table import COLUMNS, ScoreTable
from models.performer import Answer, Performer
from rl.processes import shared_out
from rl.scoring import Scorer


def score_table(
    performer: Performer,
    cases: Sequence[Case],
    budgets: Sequence[int],
    scorer: Scorer,
    max_new_tokens: int,
    batch_size: int = 128,
    path: str | Path | None = None,
    label: str = "scoring",
) -> ScoreTable:
    """Answer every case at every budget, the cases shared out over the processes; every process gets the whole table.

    With a `path` that exists, the table is read from it instead.
    """
    if path is not None and Path(path).is_file():
        return ScoreTable.load(path)
    state = PartialState()

    def answer(mine: list[int]) -> list[list[Answer]]:
        shown, columns = [cases[i] for i in mine], []
        total = len(mine) * len(budgets)
        with tqdm(total=total, desc=label, disable=not state.is_main_process, unit="answer") as bar:
            for budget in budgets:
                asked = [budget] * len(mine)
                columns.append(performer.answer(shown, asked, max_new_tokens, batch_size, bar.update))
        return [[column[k] for column in columns] for k in range(len(mine))]

    answers = shared_out(range(len(cases)), answer)
    score = np.stack(
        [
            scorer([row[k].text for row in answers], cases, [b] * len(cases), [row[k].visual for row in answers])
            for k, b in enumerate(budgets)
        ],
        axis=1,
    )
    counts = {k: np.array([[getattr(a, k) for a in row] for row in answers]) for k in COLUMNS if k != "score"}
    table = ScoreTable(
        [c.id for c in cases],
        [c.patient for c in cases],
        [c.question for c in cases],
        list(budgets),
        score,
        text=[[a.text for a in row] for row in answers],
        **counts,
    )
    if path is not None and state.is_main_process:
        table.save(path)
    state.wait_for_everyone()
    return table
