"""Zero-shot classification of slides: AUC of each class and balanced accuracy, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from frugalpath.bootstrap import Bootstrap
from frugalpath.errors import InputError


def classification(
    probabilities: np.ndarray,
    labels: Sequence[str],
    classes: Sequence[str],
    patients: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of N slides, with 95 % percentile intervals by patient.

    Args:
        probabilities: (N, C). labels: class of each slide. classes: the C names. patients: of the slides.
        resamples, seed: of the bootstrap; a resample without slides of a class, or of others, does not
            count for it.

    Returns:
        `n`, `patients`, `auc` (of each class against the others; `macro`, their mean) and `balanced_accuracy` of the
        likeliest class, each with `value` and `ci95`. Classes without slides are left out, and named in `absent`.

    Raises:
        InputError: a label is no class, or all slides have the same.
    """
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise InputError(f"labels: {', '.join(map(repr, unknown))} has no prompts; add them, or leave its slides out")
    if len(set(labels)) < 2:
        raise InputError(f"labels: all {len(labels)} slides have the same label; an AUC needs two")
    bootstrap = Bootstrap(patients, resamples, seed)
    weights = bootstrap.weight[:, bootstrap.group]
    named = np.asarray(labels)
    chosen = np.asarray(classes)[probabilities.argmax(1)]
    present = [name for name in classes if name in set(labels)]
    auc: dict[str, Any] = {}
    drawn, whole = [], []
    for name in present:
        values, is_it = probabilities[:, list(classes).index(name)], named == name
        whole.append(float(roc_auc_score(is_it, values)))
        drawn.append(_aucs(is_it, values, weights))
        auc[name] = {"value": whole[-1], "ci95": _interval(drawn[-1])}
    auc["macro"] = {"value": float(np.mean(whole)), "ci95": _interval(np.mean(drawn, 0))}
    # Balanced accuracy is the mean over classes of the share of their slides that are found. Row 0 is all slides.
    counts = np.concatenate([np.ones((1, len(named)), np.float32), weights])
    shares = np.mean([_recall(counts, named == name, chosen == name) for name in present], 0)
    return {
        "n": len(labels),
        "patients": len(set(patients)),
        "absent": [name for name in classes if name not in present],
        "auc": auc,
        "balanced_accuracy": {"value": float(shares[0]), "ci95": _interval(shares[1:])},
    }


def _aucs(is_it: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUC of each resample: the weighted share of pairs, one slide of the class and one of others, in order."""
    inside, outside = values[is_it][:, None], values[~is_it]
    won = (inside > outside) + np.float32(0.5) * (inside == outside)
    mine, others = weights[:, is_it], weights[:, ~is_it]
    with np.errstate(invalid="ignore"):  # resamples without slides of the class, or of others
        return (mine @ won * others).sum(1) / (mine.sum(1) * others.sum(1))


def _recall(weights: np.ndarray, is_it: np.ndarray, found: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # resamples without slides of the class
        return weights @ (is_it & found) / (weights @ is_it)


def _interval(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.nanquantile(values, [0.025, 0.975])]
