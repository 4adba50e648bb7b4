"""What any claim must beat, and the results by kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.case import Case
from envs.score_table import ScoreTable
from rewards.registry import gold_completion
from rl.deciders.base import Decisions
from rl.scoring import Scorer


def majority_scores(train: Sequence[Case], cases: Sequence[Case], scorer: Scorer) -> np.ndarray:
    """Scores (N,) of the commonest training answer of each kind of question; a repeated case counts once."""
    counts: dict[str, dict[str, int]] = {}
    for case in {c.id: c for c in train}.values():
        answers = counts.setdefault(case.question, {})
        answers[case.answer] = answers.get(case.answer, 0) + 1
    usual = {q: max(sorted(a), key=a.__getitem__) for q, a in counts.items()}
    texts = [gold_completion({"answer": usual.get(c.question, "")}) for c in cases]
    return scorer(texts, cases, [0] * len(cases), [0] * len(cases))


def by_question(decisions: Decisions, table: ScoreTable) -> dict[str, Any]:
    """Mean score of every static budget and of the allocator, and its tokens, for each kind of question.

    Args:
        table: the ladder's columns.
    """
    out = {}
    for name in sorted(set(table.questions)):
        rows = np.array([q == name for q in table.questions])
        out[name] = {
            "n": int(rows.sum()),
            "static": {str(b): float(table.score[rows, k].mean()) for k, b in enumerate(table.budgets)},
            "allocator": float(decisions.score[rows].mean()),
            "tokens": float(decisions.visual[rows].mean()),
        }
    return out
