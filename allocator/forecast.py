"""What a performer has said about cases at some rungs, as the inputs of forecasts.

Forecasts from what a performer has said about a case: what later rungs would score, and which answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from frugalpath.allocator.fitting import by_patient
from frugalpath.allocator.score_table import ScoreTable

SURE = 1e-4
"""Confidences are taken as within this of 0 and 1, so that their logits are bounded."""


@dataclass(frozen=True)
class Observations:
    """What a performer said about N cases at K rungs; what has not been asked yet is never read.

    Args:
        confidence: (N, K) in 0..1. text: (N, K) answers. questions: (N,) kinds.
    """

    confidence: np.ndarray
    text: np.ndarray
    questions: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, text: Sequence[Sequence[str]], questions: Sequence[str]) -> Observations:
        """From the texts of the answers, N lists of K."""
        return cls(
            confidence, np.array([list(row) for row in text], dtype=np.str_), np.array(questions, dtype=np.str_)
        )

    @classmethod
    def of_table(cls, table: ScoreTable) -> Observations:
        """From a table whose columns are the rungs."""
        return cls.of(table.confidence, table.text, table.questions)

    def at(self, cases: np.ndarray) -> Observations:
        """Some of the cases."""
        return Observations(self.confidence[cases], self.text[cases], self.questions[cases])

    def features(self, last: int, looked: np.ndarray, kinds: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Inputs (N, F) of a forecast after a look at rung `last`.

        Args:
            looked: (N, K) rungs that were looked at, `last` or not. kinds: of question; others are none of them.
            answers: those that are told apart, see `common_answers`.
        """
        sure = self.sure()
        earlier = looked & (np.arange(looked.shape[1]) != last)
        count = earlier.sum(1)
        before = np.where(earlier, sure, 0).sum(1) / count.clip(1)
        agree = (earlier & (self.text == self.text[:, last, None])).sum(1) / count.clip(1)
        kind = self.kind(kinds)
        answer = (self.answers(last)[:, None] == np.array(answers, dtype=np.str_)).astype(float)
        now = sure[:, last, None]
        any_before = count[:, None] > 0
        own = np.concatenate([now, any_before, before[:, None], agree[:, None], any_before * now], 1)
        return np.concatenate([np.ones((len(own), 1)), own, kind, kind * now, answer, answer * now], 1)

    def sure(self) -> np.ndarray:
        """Logits (N, K) of the confidences, scaled to -1..1."""
        return logit(self.confidence.clip(SURE, 1 - SURE)) / logit(1 - SURE)

    def kind(self, kinds: Sequence[str]) -> np.ndarray:
        """Which of the kinds of question a case has: (N, kinds), 0 or 1."""
        return (self.questions[:, None] == np.array(kinds, dtype=np.str_)).astype(float)

    def answers(self, rung: int) -> np.ndarray:
        """Answers (N,) at a rung, with the kind of question that they answer."""
        return np.char.add(np.char.add(self.questions, ": "), self.text[:, rung])


def common_answers(seen: Observations, least: int = 10) -> list[str]:
    """Answers that at least so many cases got at some rung; what is written once tells nothing."""
    common: set[str] = set()
    for rung in range(seen.text.shape[1]):
        found, count = np.unique(seen.answers(rung), return_counts=True)
        common |= set(found[count >= least].tolist())
    return sorted(common)


@dataclass(frozen=True)
class Forecast:
    """Expected scores of the rungs, given the answers so far: logistic regressions, one for each pair of rungs.

    A second one a rung says how likely its answer is right once all are given: where they differ, the last is not
    always the one to keep.

    Args:
        kinds, answers: of questions and answers that it tells apart.
        weights: (folds, K, K, F): of a fold's fit, after a look at one rung, the score of another, not earlier one.
        kept: (folds, K, G): the score of a rung's answer, given those of all looks.
    """

    kinds: list[str]
    answers: list[str]
    weights: np.ndarray
    kept: np.ndarray

    @property
    def flops(self) -> float:
        """FLOPs of the forecasts after one look, at most (a multiply-add counts 2)."""
        return 2.0 * (self.weights.shape[2] * self.weights.shape[3] + self.kept.shape[1] * self.kept.shape[2])

    def expected(self, seen: Observations, last: int, looked: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Scores (N, K - last) to be expected of the rungs from `last` on, each case by the fit of its fold (N,)."""
        weights = self.weights[fold, last, last:]
        return expit(np.einsum("nf,nkf->nk", seen.features(last, looked, self.kinds, self.answers), weights))

    def best(self, seen: Observations, looked: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Rung (N,) of the answer most likely right, of those looked at (N, K); of equals the last."""
        n, rungs = looked.shape
        likely = np.full((n, rungs), -np.inf)
        for rung in range(rungs):
            at = np.flatnonzero(looked[:, rung])
            inputs = _rivals(seen.at(at), looked[at], rung, self.kinds)
            likely[at, rung] = np.einsum("nf,nf->n", inputs, self.kept[fold[at], rung])
        return rungs - 1 - likely[:, ::-1].argmax(1)


def fit_forecast(seen: Observations, score: np.ndarray, kinds: list[str], answers: list[str]) -> Forecast:
    """Fit on all cases: a score of (N, K) in 0..1 is the share of a case that counts as solved."""
    n, rungs = score.shape
    weights: list[list[np.ndarray]] = []
    kept = []
    for last in range(rungs):
        ways = _ways(last, rungs)
        inputs = np.concatenate([seen.features(last, np.tile(w, (n, 1)), kinds, answers) for w in ways])
        before = [np.zeros(inputs.shape[1])] * last
        weights.append([*before, *(_fit(inputs, score[:, target]) for target in range(last, rungs))])
    for rung in range(rungs):
        ways = [way for last in range(rung, rungs) for way in _ways(last, rungs) if way[rung]]
        kept.append(
            _fit(np.concatenate([_rivals(seen, np.tile(w, (n, 1)), rung, kinds) for w in ways]), score[:, rung])
        )
    return Forecast(kinds, answers, np.array(weights)[None], np.array(kept)[None])


def _fit(inputs: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Weights (F,) of a logistic regression; inputs (W N, F) begin with 1 and are W views of N cases of score (N,)."""
    views = len(inputs) // len(score)
    share = np.tile(score.clip(1e-3, 1 - 1e-3), views)
    label = np.repeat([1, 0], len(share))
    # The views are of the same cases: together they weigh as one.
    weight = np.concatenate([share, 1 - share]) / views
    fit = LogisticRegression(max_iter=300)
    fit.fit(np.concatenate([inputs, inputs])[:, 1:], label, sample_weight=weight)
    return np.concatenate([fit.intercept_, fit.coef_[0]])


def _rivals(seen: Observations, looked: np.ndarray, rung: int, kinds: Sequence[str]) -> np.ndarray:
    """Inputs (N, G) of how likely the answer at a rung is right: how sure it was, and what the other looks said."""
    sure, kind = seen.sure(), seen.kind(kinds)
    others = looked & (np.arange(looked.shape[1]) != rung)
    same = seen.text == seen.text[:, rung, None]
    later = others & (np.arange(looked.shape[1]) > rung)
    # A rival counts by how sure it was: from nothing to 2.
    same_as, against, later_against = (
        np.where(which, 1 + sure, 0).sum(1)[:, None] for which in (others & same, others & ~same, later & ~same)
    )
    now = sure[:, rung, None]
    own = [np.ones((len(sure), 1)), now, same_as, against, later_against, later.any(1)[:, None]]
    return np.concatenate([*own, kind, kind * now, kind * same_as, kind * against], 1)


def fit_forecast_by_patient(
    seen: Observations, score: np.ndarray, patients: Sequence[str]
) -> tuple[Forecast, np.ndarray]:
    """Fits that have not seen a patient, and the fold (N,) of each case; the last fold's fit has seen all."""
    fold = np.zeros(len(score), dtype=int)
    fits = []
    kinds, answers = sorted(set(seen.questions.tolist())), common_answers(seen)
    for number, (known, held) in enumerate(by_patient(patients)):
        fold[held] = number
        fits.append(fit_forecast(seen.at(known), score[known], kinds, answers))
    fits.append(fit_forecast(seen, score, kinds, answers))
    weights, kept = (np.concatenate(parts) for parts in zip(*((f.weights, f.kept) for f in fits), strict=True))
    return Forecast(kinds, answers, weights, kept), fold


def _ways(last: int, rungs: int) -> list[np.ndarray]:
    """Which rungs (K,) may have been looked at before: none, all, or one of them."""
    rung = np.arange(rungs)
    ways = [rung == last, rung <= last, *((rung == last) | (rung == one) for one in range(last))]
    return [np.array(way) for way in {tuple(w): None for w in ways}]
