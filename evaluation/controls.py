"""Controls that any claim must beat, and results by kind of question.

Attribution of the gain to stages: the performer before training, after SFT, after SFT continued, after GRPO.

A strong baseline on choice cases: a logistic regression on the same frozen features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from frugalpath.allocator.base import Decisions
from frugalpath.allocator.score_table import ScoreTable, chosen
from frugalpath.bootstrap import Bootstrap
from frugalpath.envs.case import Case
from frugalpath.evaluation.frontier import Point, point
from frugalpath.models.feature_bank import COLUMNS, FeatureBank
from frugalpath.recipe.data import RunData
from frugalpath.rewards.registry import gold_completion
from frugalpath.rewards.scoring import Scorer


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


@dataclass(frozen=True)
class Attribution:
    """Of each stage: its point, and for those that were trained the scores (N,) and completions on the test cases."""

    points: dict[str, Point]
    scores: dict[str, np.ndarray]
    texts: dict[str, list[str]]


def best_static(table: ScoreTable) -> int:
    """Rung of the most accurate budget of a table; on a tie the cheaper one."""
    return int(np.argmax(table.score.mean(0)))


def attribute(
    ladder: Sequence[int], base: ScoreTable, stages: Mapping[str, Mapping[str, ScoreTable]], bootstrap: Bootstrap
) -> Attribution:
    """Evaluate every stage at its best static budget on validation cases; the untrained performer at the largest.

    Args:
        base: the untrained performer's table of the test cases, of one budget.
        stages: tables `val` and `test` of the performer after each stage, in order. bootstrap: over the test cases.
    """
    found = Attribution({"base": _point(base, bootstrap)}, {}, {})
    for name, tables in stages.items():
        table = tables["test"].at([ladder[best_static(tables["val"].at(ladder))]])
        found.points[name] = _point(table, bootstrap)
        found.scores[name] = table.score[:, 0]
        found.texts[name] = [row[0] for row in table.text]
    return found


def _point(table: ScoreTable, bootstrap: Bootstrap) -> Point:
    """Point of a table with one budget."""
    return point(table.score[:, 0], table.visual[:, 0], table.flops[:, 0], bootstrap, budget=table.budgets[0])


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def linear_probe(
    data: RunData, test: ScoreTable, rungs: np.ndarray, best: int, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Balanced accuracy by question: probe, performer at its best static budget, performer with allocator.

    The probe reads mean features (one token), is trained on the training cases, and its regularisation is chosen on
    validation cases. None if the recipe switches it off or has no choice cases.

    Args:
        test: the performer's table. rungs: the allocator's choices (N,). best: rung of the best static budget.
    """
    if not data.run.evaluation.linear_probe:
        return None
    table = test.at(data.run.ladder)
    out = {}
    cases = data.splits["test"]
    for question in sorted({c.question for c in cases if c.task == "choice"}):
        rows = np.array([c.question == question for c in cases])
        splits = {s: [c for c in members if c.question == question] for s, members in data.splits.items()}
        inputs = {s: mean_features(members, data.bank) for s, members in splits.items()}
        gold = {s: np.array([c.answer for c in members]) for s, members in splits.items()}
        fitted = [_fit(inputs["train"], gold["train"], c) for c in STRENGTHS]
        value = [balanced_accuracy_score(gold["val"], f.predict(inputs["val"])) for f in fitted]
        right = fitted[int(np.argmax(value))].predict(inputs["test"]) == gold["test"]
        own = chosen(table.score, rungs)[rows]
        within = Bootstrap([c.patient for c in splits["test"]], len(bootstrap.weight))
        out[question] = {
            "n": int(rows.sum()),
            "C": STRENGTHS[int(np.argmax(value))],
            "linear_probe": _balanced(right, gold["test"], within),
            "best_static": _balanced(table.score[rows, best] == 1, gold["test"], within),
            "allocator": _balanced(own == 1, gold["test"], within),
            "difference": _balanced((own == 1).astype(float) - right, gold["test"], within),
        }
    return out or None


def mean_features(cases: list[Case], bank: FeatureBank) -> np.ndarray:
    """Mean features (N, d) of cases: of all images and slides of a case that have features."""
    sources = [[s for s in (*c.images, *c.slides) if s not in bank.missing] for c in cases]
    return np.stack([np.mean([bank.see(s, 1).rows[0, :-COLUMNS].numpy() for s in each], axis=0) for each in sources])


def _fit(x: np.ndarray, y: np.ndarray, strength: float) -> Any:
    model = LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")
    return make_pipeline(StandardScaler(), model).fit(x, y)


def _balanced(right: np.ndarray, gold: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean over classes of the mean of `right` in the class, with an interval over patients."""
    right = right.astype(float)
    classes = np.unique(gold)
    sums, sizes = [], []
    for label in classes:
        of = (gold == label).astype(float)
        groups = len(bootstrap.size)
        sums.append(bootstrap.weight @ np.bincount(bootstrap.group, weights=right * of, minlength=groups))
        sizes.append(bootstrap.weight @ np.bincount(bootstrap.group, weights=of, minlength=groups))
    drawn = np.nanmean(np.stack(sums) / np.where(np.stack(sizes) > 0, np.stack(sizes), np.nan), axis=0)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    value = float(np.mean([right[gold == label].mean() for label in classes]))
    return {"value": value, "ci95": [float(low), float(high)]}
