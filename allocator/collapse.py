"""Watch a joint run for the ways in which either policy collapses, and name the remedy."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import TrainerCallback

from frugalpath.allocator.base import Allocator

logger = logging.getLogger(__name__)

STUCK = {
    "smallest_budget": "the smallest budget; lower allocator.price (or the prices of evaluation), raise "
    "allocator.explore or allocator.entropy, and see in the score table whether any larger budget answers better",
    "largest_budget": "the largest budget; raise allocator.price (or the prices of evaluation), raise "
    "allocator.explore or allocator.entropy, and add a smaller budget to the ladder if the smallest is much worse",
    "below_cap": "the budget just below the cap, since allocator.objective birr makes all budgets below it cost the "
    "same; set it to linear, log or dual",
    "largest_share": "one budget; change allocator.price (lower if it is the smallest budget, higher if the largest) "
    "or raise allocator.explore",
}
BLIND = (
    "chooses the budget by the question alone and not by the image; give it a better look (allocator.look), more "
    "validation cases (val_fraction), or a larger allocator.width, and see in the report what the oracle gains"
)
INSENSITIVE = 0.02
"""Bits of mutual information between budget and image, given the question, under which the image has no say."""
ENOUGH = 10
"""Cases that share their question with another one, under which nothing can be said of that."""


class CollapseGuard(TrainerCallback):
    """Reads the trainer's logs and warns once of each collapse; the warnings also go into the report.

    Args:
        patience: consecutive logs that must agree before a warning.
        fall: fall of the mean reward below its best smoothed value that counts as collapse of the performer.
        share: share of one rung among the allocator's choices that counts as collapse of the allocator.
        entropy: mean token entropy (nats) under which the performer no longer explores.
    """

    def __init__(self, patience: int = 3, fall: float = 0.15, share: float = 0.98, entropy: float = 1e-3):
        self.patience, self.fall, self.share, self.entropy = patience, fall, share, entropy
        self.warnings: list[str] = []
        self._smooth: float | None = None
        self._best = float("-inf")
        self._streak: Counter[str] = Counter()
        self._told: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer: a resumed run has a history that counts."""
        for row in state.log_history:
            self.read(row["step"], row)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.read(state.global_step, logs or {})

    def read(self, step: int, logs: dict[str, Any]) -> None:
        """Take in the metrics logged at a step."""
        if "allocator/largest_share" in logs:
            self._read_allocator(step, logs)
        if "reward" not in logs:
            return
        reward = float(logs["reward"])
        self._smooth = reward if self._smooth is None else 0.7 * self._smooth + 0.3 * reward
        self._best = max(self._best, self._smooth)
        self._check(
            "reward",
            self._smooth < self._best - self.fall,
            step,
            f"the mean reward fell from {self._best:.3f} to {self._smooth:.3f}: the performer is collapsing; "
            "lower learning_rate, set beta (for example 0.02) or lower num_iterations",
        )
        self._check(
            "entropy",
            float(logs.get("entropy", 1.0)) < self.entropy,
            step,
            f"token entropy is {float(logs.get('entropy', 1.0)):.1e}: the performer no longer explores; "
            "raise temperature, lower learning_rate or stop the warm start earlier",
        )
        self._check(
            "silent",
            float(logs.get("frac_reward_zero_std", 0.0)) > 0.98,
            step,
            "almost every group has equal rewards, so nothing is learnt; raise temperature or num_generations, "
            "or use harder cases",
        )

    def _read_allocator(self, step: int, logs: dict[str, Any]) -> None:
        """Of a step in which the allocator learns; others say nothing about it."""
        told = {
            kind: float(logs.get(f"allocator/{kind}", 0.0))
            for kind in ("below_cap", "smallest_budget", "largest_budget", "largest_share")
        }
        # The most specific of them is told; `largest_share` is of whatever budget is commonest.
        stuck = next((kind for kind, share in told.items() if share > self.share), None)
        for kind, share in told.items():
            self._check(kind, kind == stuck, step, f"the allocator gives {share:.0%} of the cases {STUCK[kind]}")
        self._check(
            "image",
            stuck is None and float(logs.get("allocator/image_information", 1.0)) < INSENSITIVE,
            step,
            f"the allocator {BLIND}",
        )

    def _check(self, kind: str, bad: bool, step: int, message: str) -> None:
        self._streak[kind] = self._streak[kind] + 1 if bad else 0
        if self._streak[kind] >= self.patience and kind not in self._told:
            self._told.add(kind)
            self.warnings.append(f"step {step}: {message}")
            logger.warning("step %d: %s", step, message)


def image_information(rungs: Sequence[int], questions: Sequence[Hashable]) -> float | None:
    """Mutual information, in bits, between the chosen budget and the image given the question.

    A choice is settled by question and image, so that it is the entropy of the budgets of a question. Questions that
    stand alone tell nothing.

    Args:
        rungs: (N,). questions: of the N cases, their text.

    Returns:
        The mean over the cases whose question others have too; None if there are hardly any.
    """
    groups: dict[Hashable, list[int]] = {}
    for question, rung in zip(questions, rungs, strict=True):
        groups.setdefault(question, []).append(int(rung))
    shared = [group for group in groups.values() if len(group) > 1]
    count = sum(map(len, shared))
    if count < ENOUGH:
        return None
    bits = 0.0
    for group in shared:
        share = np.bincount(group) / len(group)
        share = share[share > 0]
        bits -= len(group) * float((share * np.log2(share)).sum())
    return bits / count


def collapsed(
    rungs: Mapping[float, np.ndarray],
    questions: Sequence[Hashable],
    ladder: Sequence[int],
    below_cap: int | None = None,
    share: float = 0.98,
) -> list[str]:
    """Warnings about a fitted allocator whose choices are the same, or blind to the image, at every price.

    Args:
        rungs: price -> chosen rungs (N,). questions: of the N cases.
        below_cap: the rung just below the cap, where the objective has one.
        share: of the cases that count as all.
    """
    shares = np.stack([np.bincount(chosen, minlength=len(ladder)) / len(chosen) for chosen in rungs.values()])
    for rung in np.flatnonzero((shares > share).all(0)):
        kinds = {0: "smallest_budget", len(ladder) - 1: "largest_budget", below_cap: "below_cap"}
        kind = kinds.get(int(rung), "largest_share")
        return [f"the fitted allocator gives at every price {shares[:, rung].min():.0%} of cases {STUCK[kind]}"]
    # Where all get one budget, as they should at the ends of the range of prices, nothing can depend on the image.
    mixed = [chosen for chosen, own in zip(rungs.values(), shares, strict=True) if own.max() <= share]
    told = [image_information(chosen.tolist(), questions) for chosen in mixed]
    if mixed and all(bits is not None and bits < INSENSITIVE for bits in told):
        return [f"the fitted allocator {BLIND}"]
    return []


def collapse(allocator: Allocator) -> list[str]:
    """Warnings about choices that are the same, or blind to the image, for all validation cases at every price."""
    data = allocator.data
    prices = allocator.prices(data.run.evaluation.prices) if allocator.settled is None else [allocator.settled]
    rungs = {price: allocator.decide("val", price).rungs for price in prices}
    prompts = [c.prompt for c in data.splits["val"]]
    return [*collapsed(rungs, prompts, allocator.ladder, allocator.objective.below_cap), *allocator.warnings()]
