"""Which split of a case is worth most: predicted score minus price times cost, over budgets of each slide.

A split is a tuple of tokens, one a slide; 0 does not show it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.case import Case
from models.performer import Performer
from models.share_out import share_out
from slides.whole import write_text

Split = tuple[int, ...]
EXHAUSTIVE = 4096
"""A case with at most so many splits has all of them judged; beyond, budgets are raised one by one."""
DRAWS = 50
"""Draws for each random split that is wanted; a case may have fewer."""


@dataclass(frozen=True)
class Room:
    """Splits that a case may have.

    Args:
        levels: of each slide, ascending from 0. most: tokens of a case.
        equal: splits by equal shares, of every rung of the case's ladder.
    """

    levels: tuple[tuple[int, ...], ...]
    most: int
    equal: tuple[Split, ...]

    @classmethod
    def of(cls, performer: Performer, case: Case, slide_ladder: Sequence[int], ladder: Sequence[int]) -> Room:
        """What a performer can be shown of a case; budgets above what a slide gives are what it gives."""
        rooms = [performer.room(s) for s in performer.sources(case)]
        equal = tuple(tuple(share_out(budget, [1.0] * len(rooms), rooms)) for budget in ladder)
        levels = tuple(tuple(sorted({int(min(b, room)) for b in slide_ladder})) for room in rooms)
        return cls(levels, ladder[-1], equal)

    @property
    def count(self) -> int:
        """Combinations of the slides' budgets."""
        return math.prod(map(len, self.levels))

    def all(self) -> list[Split]:
        """Every split: the equal ones, then the others that show something and keep to the case's largest budget."""
        others = (s for s in itertools.product(*self.levels) if 0 < sum(s) <= self.most)
        return list(dict.fromkeys([*self.equal, *others]))

    def draw(self, count: int, rng: np.random.Generator) -> list[Split]:
        """The equal splits and up to so many others at random, all different.

        A total is drawn from the ladder; slides get what is left of it in random order, so that cheap splits are as
        likely as dear ones, however many slides there are.
        """
        drawn = dict.fromkeys(self.equal)
        for _ in range(DRAWS * count):
            if len(drawn) == count + len(set(self.equal)):
                break
            split, left = [0] * len(self.levels), sum(self.equal[rng.integers(len(self.equal))])
            for k in rng.permutation(len(self.levels)):
                split[k] = int(rng.choice([level for level in self.levels[k] if level <= left]))
                left -= split[k]
            if any(split):
                drawn[tuple(split)] = None
        return list(drawn)


def greedy(
    room: Room, value: Callable[[list[Split]], np.ndarray], cost: Callable[[list[Split]], np.ndarray], price: float
) -> tuple[Split, int]:
    """Raise the slide that gains most for its cost until nothing gains; never worse than the best equal split.

    Of scores that are sums of concave functions of the slides' budgets, at a cost that grows evenly, this is the best
    of all splits while the case's largest budget does not bind (marginal analysis, Fox 1966).

    Args:
        value: predicted scores of splits. cost: of splits, the largest budget = 1.

    Returns:
        The split; how many were judged.
    """
    nothing: Split = (0,) * len(room.levels)
    judged = len(room.equal) + 1
    scores = value([nothing, *room.equal])
    split, score, spent = nothing, float(scores[0]), float(cost([nothing])[0])
    while True:
        raised = [
            (*split[:k], level, *split[k + 1 :])
            for k, levels in enumerate(room.levels)
            for level in levels
            if level > split[k] and sum(split) - split[k] + level <= room.most
        ]
        if not raised:
            break
        judged += len(raised)
        found, costs = value(raised), cost(raised)
        gain, more = found - score, np.maximum(costs - spent, 1e-12)
        # Something is shown, whatever it costs.
        worth = (gain > price * more) if any(split) else np.ones(len(raised), bool)
        if not worth.any():
            break
        rate = np.where(worth, gain / more, -np.inf) if any(split) else gain - price * more
        best = int(rate.argmax())
        split, score, spent = raised[best], float(found[best]), float(costs[best])
    options = [split, *room.equal] if any(split) else list(room.equal)
    worths = np.array([score, *scores[1:]][-len(options) :]) - price * cost(options)
    return options[int(worths.argmax())], judged


@dataclass(frozen=True)
class SplitCost:
    """FLOPs of an answer by its split, the largest budget = 1: of tokens, their square and slides shown.

    Least squares on answered splits, within cases: what they say differs in length by case and not by split.
    """

    coefficients: np.ndarray
    offset: float
    largest: float

    @classmethod
    def fit(cls, splits: Sequence[Sequence[Split]], flops: Sequence[Sequence[float]], largest: float) -> SplitCost:
        """From the splits and FLOPs of each case.

        Args:
            largest: FLOPs of an answer at the largest budget, in the mean.
        """
        rows = [cls._terms(s) for s in splits]
        means = [r.mean(0) for r in rows]
        costs = [np.asarray(f, dtype=float) for f in flops]
        within = np.concatenate([r - m for r, m in zip(rows, means, strict=True)])
        centred = np.concatenate([c - c.mean() for c in costs])
        scale = np.abs(within).max(0).clip(1e-12)
        coefficients = np.linalg.lstsq(within / scale, centred, rcond=None)[0] / scale
        offset = float(np.mean([c.mean() - m @ coefficients for c, m in zip(costs, means, strict=True)]))
        return cls(coefficients, offset, largest)

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(vars(self), default=np.ndarray.tolist) + "\n")

    @classmethod
    def load(cls, path: Path) -> SplitCost:
        """Read what `save` wrote."""
        kept = json.loads(path.read_text())
        return cls(np.array(kept["coefficients"]), kept["offset"], kept["largest"])

    @staticmethod
    def _terms(splits: Sequence[Split]) -> np.ndarray:
        tokens = np.array([sum(s) for s in splits], dtype=float)
        return np.stack([tokens, tokens**2, [float(np.count_nonzero(s)) for s in splits]], 1)

    def __call__(self, splits: Sequence[Split]) -> np.ndarray:
        """Costs (len(splits),)."""
        return (self._terms(splits) @ self.coefficients + self.offset) / self.largest
