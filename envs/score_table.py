"""Score tables: what a frozen performer scores on every case at every budget, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slides.errors import InputError
from slides.whole import whole

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
