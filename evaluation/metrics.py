"""Metrics of the allocator: calibration of its predictions, and whether it spends where that helps.

Also the mutual information of the chosen budget with question and image, in bits, against chance.

An allocator that ignores the image chooses by the question alone: given the question, its budget then has no
information on the image.

Per-field results of synoptic reports, stage by stage, at the budget that each stage's validation table prefers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import StandardScaler

from frugalpath.bootstrap import Bootstrap
from frugalpath.envs.case import Case
from frugalpath.rewards.synoptic.corpus import corpus_report, table_text
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.reward import score_completions

BINS = 10
"""Bins of a reliability curve; each has at least `PER_BIN` cases."""
PER_BIN = 10


def base_rates(score: np.ndarray, questions: Sequence[str], asked: Sequence[str]) -> np.ndarray:
    """Forecasts (M, K) for the questions `asked`: mean scores (N, K) by kind of question, or of all for a new kind."""
    kinds = np.array(questions)
    means = {q: score[kinds == q].mean(0) for q in set(questions)}
    return np.stack([means.get(q, score.mean(0)) for q in asked])


def reliability(predicted: np.ndarray, score: np.ndarray, base: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """How well predictions (N,) forecast scores (N,), both in 0..1.

    Args:
        base: (N,) forecast without the image.

    Returns:
        `predicted`, `observed`: means. `ece`: expected calibration error over bins of equal mass (Nguyen and O'Connor
        2015); it is above 0 by chance too. `brier`: mean squared error, `brier_skill`: 1 - brier / brier of `base`,
        None where that is 0. `curve`: `{n, predicted, observed}` of each bin. Equal predictions share a bin.
    """
    bins = max(1, min(bins, len(score) // PER_BIN))
    edges = np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1])
    members = np.searchsorted(edges, predicted, "right")
    curve = []
    for b in np.unique(members):
        rows = members == b
        means = {"predicted": float(predicted[rows].mean()), "observed": float(score[rows].mean())}
        curve.append({"n": int(rows.sum()), **means})
    brier, plain = (float(((p - score) ** 2).mean()) for p in (predicted, base))
    return {
        "predicted": float(predicted.mean()),
        "observed": float(score.mean()),
        "ece": sum(c["n"] * abs(c["predicted"] - c["observed"]) for c in curve) / len(score),
        "brier": brier,
        "brier_skill": 1 - brier / plain if plain > 0 else None,
        "curve": curve,
    }


def calibration(predicted: np.ndarray, score: np.ndarray, base: np.ndarray, budgets: Sequence[int]) -> dict[str, Any]:
    """`reliability` of predicted scores (N, K) at every budget, and overall.

    Args:
        base: (N, K), see `base_rates`.
    """
    columns = zip(budgets, predicted.T, score.T, base.T, strict=True)
    return {
        "by_budget": {str(b): reliability(p, s, r) for b, p, s, r in columns},
        "all": reliability(predicted.ravel(), score.ravel(), base.ravel()),
    }


def spend(
    score: np.ndarray, tokens: np.ndarray, rungs: np.ndarray, budgets: Sequence[int], bootstrap: Bootstrap
) -> dict:
    """Measure whether more is spent where it helps.

    A case's gain is its score at the largest budget minus that at the smallest.

    Args:
        score: (N, K). tokens, rungs: (N,) what was spent.

    Returns:
        `by_budget`: `n` and mean `gain` `{value, ci95}` of the cases that got it. `rank_correlation` of spend with
        gain (Spearman) as `{value, ci95}`, None where either is the same for all cases.
    """
    gain = score[:, -1] - score[:, 0]
    by_budget = {}
    for k, budget in enumerate(budgets):
        rows = rungs == k
        if rows.any():
            low, high = bootstrap.interval(np.where(rows, gain, np.nan))
            by_budget[str(budget)] = {
                "n": int(rows.sum()),
                "gain": {"value": float(gain[rows].mean()), "ci95": [low, high]},
            }
    return {"by_budget": by_budget, "rank_correlation": rank_correlation(tokens, gain, bootstrap)}


def rank_correlation(x: np.ndarray, y: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Spearman's rank correlation of x and y (N,) as `{value, ci95}`; the cases are ranked anew in each resample."""
    levels = [np.unique(v, return_inverse=True)[1] for v in (x, y)]
    value = _weighted(levels, np.ones(len(x)))
    if np.isnan(value):
        return {"value": None, "ci95": None}
    drawn = [_weighted(levels, weight[bootstrap.group]) for weight in bootstrap.weight.astype(float)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"value": value, "ci95": [float(low), float(high)]}


def _weighted(levels: list[np.ndarray], weight: np.ndarray) -> float:
    """Pearson's correlation of the mid-ranks of two columns of levels, each case counted `weight` times."""
    ranks = []
    for level in levels:
        count = np.bincount(level, weights=weight)
        middle = (np.cumsum(count) - count / 2)[level]
        ranks.append(middle - (weight @ middle) / weight.sum())
    x, y = ranks
    spread = (weight @ x**2) * (weight @ y**2)
    return float((weight * x) @ y / np.sqrt(spread)) if spread > 1e-9 else float("nan")


PERMUTATIONS = 500
KINDS = 8
"""Maximum number of kinds of image."""
PER_KIND = 10
"""Minimum mean number of images per kind."""


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
    """Information in the chosen rungs (N,).

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


def field_results(
    cases: Sequence[Case], completions: Mapping[str, Sequence[str]], resamples: int, seed: int
) -> dict[str, Any]:
    """Corpus reports of every stage by protocol, and the gain of each stage over the first.

    Args:
        cases: test cases; those of other tasks than `synoptic` are left out.
        completions: stage -> completions of all cases.
        resamples, seed: of the bootstrap, by patient.

    Returns:
        protocol -> {stage -> `corpus_report`, with `gain` `{value, ci95}`: the mean over cases of the difference in
        non-null accuracy to the first stage, paired}. Empty without synoptic cases.
    """
    results: dict[str, Any] = {}
    for name in sorted({str(c.protocol) for c in cases if c.task == "synoptic"}):
        rows = [i for i, c in enumerate(cases) if c.task == "synoptic" and c.protocol == name]
        answers, protocols = [cases[i].answer for i in rows], [name] * len(rows)
        first: np.ndarray | None = None
        for stage, texts in completions.items():
            found = score_completions([texts[i] for i in rows], answers, protocols)
            kept = [(i, score) for i, score in zip(rows, found, strict=True) if score is not None]
            patients = [cases[i].patient for i, _ in kept]
            report = corpus_report([score for _, score in kept], load_protocol(name), patients, resamples, seed)
            accuracy = np.array([score.non_null_accuracy for _, score in kept], dtype=float)
            if first is None:
                first = accuracy
            else:
                report["gain"] = Bootstrap(patients, resamples, seed).difference(accuracy - first)
            results.setdefault(name, {})[stage] = report
    return results


def print_fields(results: Mapping[str, Any]) -> None:
    """Print the tables of all stages."""
    for protocol, stages in results.items():
        for stage, report in stages.items():
            print(f"\nfields of {protocol}, {stage}\n{table_text(report)}")
            if "gain" in report:
                low, high = report["gain"]["ci95"]
                print(
                    f"non-null accuracy over the first stage: {report['gain']['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
                )
