"""Score tables: what a frozen performer scores on every case at every budget, and what that costs.

Makes the score table of a frozen performer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from frugalpath.distributed import shared_out
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.files import whole
from frugalpath.models.performer import Answer, Performer
from frugalpath.rewards.scoring import Scorer

COLUMNS = ("score", "confidence", "visual", "prompt", "generated", "flops")


@dataclass
class ScoreTable:
    """Greedy answers of a performer to N cases at K budgets.

    Args:
        ids, patients, questions: of the cases, length N.
        budgets: K budgets in tokens; 0 shows no image.
        score: (N, K) in 0..1.
        confidence: (N, K) probability that the performer gave its answer, in 0..1.
        visual, prompt, generated: (N, K) token counts.
        flops: (N, K) of every answer, compressors or vision tower included.
        text: completions, N lists of K.
    """

    ids: list[str]
    patients: list[str]
    questions: list[str]
    budgets: list[int]
    score: np.ndarray
    confidence: np.ndarray
    visual: np.ndarray
    prompt: np.ndarray
    generated: np.ndarray
    flops: np.ndarray
    text: list[list[str]]

    def at(self, budgets: Sequence[int]) -> ScoreTable:
        """The columns of some budgets."""
        keep = [self.budgets.index(b) for b in budgets]
        arrays = {k: getattr(self, k)[:, keep] for k in COLUMNS}
        text = [[row[k] for k in keep] for row in self.text]
        return ScoreTable(self.ids, self.patients, self.questions, list(budgets), text=text, **arrays)

    def save(self, path: str | Path) -> None:
        """Write as JSON lines, one case a line, atomically."""
        with whole(path) as part, part.open("w") as file:
            file.write(json.dumps({"budgets": self.budgets}) + "\n")
            for i, name in enumerate(self.ids):
                row: dict[str, Any] = {"id": name, "patient": self.patients[i], "question": self.questions[i]}
                for key in COLUMNS:
                    row[key] = getattr(self, key)[i].tolist()
                file.write(json.dumps({**row, "text": self.text[i]}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            InputError: an earlier version wrote it.
        """
        head, *rows = (json.loads(line) for line in Path(path).read_text().splitlines())
        if rows and (missing := [k for k in COLUMNS if k not in rows[0]]):
            raise InputError(f"{path}: has no {', '.join(missing)}, as earlier versions wrote it; delete the file")
        fields: dict[str, Any] = {k: np.array([r[k] for r in rows]) for k in COLUMNS}
        fields |= {f"{k}s": [r[k] for r in rows] for k in ("id", "patient", "question")}
        return cls(budgets=head["budgets"], text=[r["text"] for r in rows], **fields)


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
