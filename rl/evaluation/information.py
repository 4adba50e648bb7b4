"""How much the chosen budget tells of the question and of the image, in bits, against chance.

An allocator that ignores the image chooses by the question alone: its budget then tells nothing of the image once the
question is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

PERMUTATIONS = 500
KINDS = 8
"""Kinds of image that are told apart at most."""
PER_KIND = 10
"""Images of a kind at least, in the mean."""


def entropy(*labels: np.ndarray) -> float:
    """Entropy (bits) of the joint distribution of labels (N,), small integers from 0, with the bias correction of
    Miller (1955)."""
    cell = labels[0]
    for label in labels[1:]:
        cell = cell * (label.max() + 1) + label
    count = np.bincount(cell)
    count = count[count > 0]
    share = count / count.sum()
    return float(-(share * np.log2(share)).sum() + (len(count) - 1) / (2 * count.sum()) / np.log(2))


def mutual_information(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """I(x; y) or I(x; y | given) in bits, of labels (N,); the correction can take it below 0."""
    given = np.zeros(len(x), int) if given is None else given
    return entropy(x, given) + entropy(y, given) - entropy(x, y, given) - entropy(given)


def image_kinds(features: np.ndarray, images: Sequence[Any], seed: int = 0) -> np.ndarray:
    """Kind (N,) of each case's image: clusters of the images' mean features (N, d) by k-means.

    Images themselves are too many to be labels: with one case of each, any budget would tell the image.

    Args:
        images: what each of the N cases shows; an image counts once.
    """
    first = {image: i for i, image in reversed(list(enumerate(images)))}
    order = sorted(first.values())
    count = max(1, min(KINDS, len(order) // PER_KIND))
    scaled = StandardScaler().fit(features[order]).transform(features)
    return KMeans(count, n_init=4, random_state=seed).fit(scaled[order]).predict(scaled)


def budget_information(
    rungs: np.ndarray, questions: Sequence[str], kinds: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """What the chosen rungs (N,) tell.

    Args:
        questions: kind of question (N,). kinds: of image (N,), see `image_kinds`.

    Returns:
        `entropy` of the choice (bits). `question`: I(budget; question). `image_given_question`: I(budget; kind of
        image | question), a lower bound of what is told of the image itself; `image_at_most`, the entropy of the
        choice within a question, is the upper bound. The informations are `{bits, nats, chance, chance95, p}`: the
        mean and 95 % quantile when the budgets are dealt out anew (among all cases, and among those of a question),
        and the share of such deals that tell as much.
    """
    asked = np.unique(np.asarray(questions), return_inverse=True)[1]
    rng = np.random.default_rng(seed)

    def within() -> np.ndarray:
        dealt = rungs.copy()
        for q in range(asked.max() + 1):
            rows = np.flatnonzero(asked == q)
            dealt[rows] = rungs[rng.permutation(rows)]
        return dealt

    return {
        "entropy": entropy(rungs),
        "question": _against_chance(lambda r: mutual_information(r, asked), rungs, lambda: rng.permutation(rungs)),
        "image_given_question": _against_chance(lambda r: mutual_information(r, kinds, asked), rungs, within),
        "image_at_most": entropy(rungs, asked) - entropy(asked),
        "image_kinds": len(np.unique(kinds)),
    }


def _against_chance(
    tells: Callable[[np.ndarray], float], rungs: np.ndarray, deal: Callable[[], np.ndarray]
) -> dict[str, float]:
    bits = tells(rungs)
    chance = np.array([tells(deal()) for _ in range(PERMUTATIONS)])
    return {
        "bits": bits,
        "nats": bits * float(np.log(2)),
        "chance": float(chance.mean()),
        "chance95": float(np.quantile(chance, 0.95)),
        "p": float((1 + (chance >= bits - 1e-12).sum()) / (1 + PERMUTATIONS)),
    }
