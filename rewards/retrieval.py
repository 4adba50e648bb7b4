"""Retrieval of texts by slides and of slides by texts: recall, rank and the chance of both (methods 4.5).

Many reports are equal word for word, so that a hit is any candidate of the query's own text, not its own pair alone.
A pool of many equal texts is easy at rank 1 and hard after it, because copies of one wrong text fill the first ranks;
therefore slides also search the distinct texts, each listed once. Equal texts find the same slides, so that a pool of
few distinct texts asks few questions; therefore each distinct text also asks once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import hypergeom

from frugalpath.bootstrap import Bootstrap

RANKS = (1, 3, 5, 10)
"""Ranks that recall is given at."""


def retrieval(
    scores: np.ndarray, texts: Sequence[str], patients: Sequence[str], resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Figures of a pool of N slide-text pairs.

    Args:
        scores: (N, N) similarity of slides (rows) and texts (columns), in the order of the pairs.
        texts: of the pairs. patients: of the pairs; those of one patient are drawn together.
        resamples, seed: of the bootstrap.

    Returns:
        `pairs`, `distinct_texts`, `patients`, and for `slide_to_text`, `slide_to_distinct_text`, `text_to_slide` and
        `distinct_text_to_slide`: `queries`, `pool`, `median_rank` (from 1) and `recall@k`, each of `value`, `ci95` and
        `chance`, that of a random order. Intervals hold the pool as it is and draw the queries again: by patient, and
        distinct texts one by one.

    Raises:
        ValueError: shapes differ, there is no pair, or a score is not finite.
    """
    if scores.shape != (len(texts), len(texts)) or len(patients) != len(texts):
        raise ValueError(f"scores {scores.shape} of {len(texts)} texts and {len(patients)} patients")
    if not np.isfinite(scores).all():
        raise ValueError("scores contain NaN or infinite values")
    bootstrap = Bootstrap(patients, resamples, seed)
    named = np.asarray(texts)
    hits = named[:, None] == named[None]
    _, once = np.unique(named, return_index=True)
    return {
        "pairs": len(texts),
        "distinct_texts": len(once),
        "patients": len(set(patients)),
        "slide_to_text": _direction(scores, hits, bootstrap),
        "slide_to_distinct_text": _direction(scores[:, once], hits[:, once], bootstrap),
        "text_to_slide": _direction(scores.T, hits, bootstrap),
        "distinct_text_to_slide": _direction(
            scores.T[once], hits[once], Bootstrap([str(i) for i in range(len(once))], resamples, seed)
        ),
    }


def first_ranks(scores: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Rank (Q,), from 1, of each query's best hit; wrong candidates that score the same come before it.

    Args:
        scores: (Q, C) of each query's candidates. hits: (Q, C) whether a candidate is right; one a row at least.
    """
    best = np.where(hits, scores, -np.inf).max(1, keepdims=True)
    return 1 + ((scores >= best) & ~hits).sum(1)


def _direction(scores: np.ndarray, hits: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    ranks = first_ranks(scores, hits)
    pool = scores.shape[1]
    found: dict[str, Any] = {"queries": len(ranks), "pool": pool, "median_rank": float(np.median(ranks))}
    for k in RANKS:
        hit = (ranks <= k).astype(float)
        # No hit among the k first of a random order.
        missed = hypergeom.pmf(0, pool, hits.sum(1), min(k, pool))
        found[f"recall@{k}"] = {
            "value": float(hit.mean()),
            "ci95": list(bootstrap.interval(hit)),
            "chance": float(1 - missed.mean()),
        }
    return found
