"""Forecasts from what a performer has said about a case: what later rungs would score, and which answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from rl.allocation.fitting import by_patient
from rl.allocation.seen import Seen, common_answers


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

    def expected(self, seen: Seen, last: int, looked: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Scores (N, K - last) to be expected of the rungs from `last` on, each case by the fit of its fold (N,)."""
        weights = self.weights[fold, last, last:]
        return expit(np.einsum("nf,nkf->nk", seen.features(last, looked, self.kinds, self.answers), weights))

    def best(self, seen: Seen, looked: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Rung (N,) of the answer most likely right, of those looked at (N, K); of equals the last."""
        n, rungs = looked.shape
        likely = np.full((n, rungs), -np.inf)
        for rung in range(rungs):
            at = np.flatnonzero(looked[:, rung])
            inputs = _rivals(seen.at(at), looked[at], rung, self.kinds)
            likely[at, rung] = np.einsum("nf,nf->n", inputs, self.kept[fold[at], rung])
        return rungs - 1 - likely[:, ::-1].argmax(1)


def fit_forecast(seen: Seen, score: np.ndarray, kinds: list[str], answers: list[str]) -> Forecast:
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


def _rivals(seen: Seen, looked: np.ndarray, rung: int, kinds: Sequence[str]) -> np.ndarray:
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


def fit_forecast_by_patient(seen: Seen, score: np.ndarray, patients: Sequence[str]) -> tuple[Forecast, np.ndarray]:
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
