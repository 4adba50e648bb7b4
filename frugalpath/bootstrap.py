"""Bootstrap intervals of means over cases, with the cases of a patient drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Bootstrap:
    """Resamples of patients, drawn once, so that every difference is paired.

    Args:
        patients: patient of every case; cases of one patient are drawn together.
        resamples: number of resamples. seed: of the draws.

    Raises:
        ValueError: there is no case.
    """

    def __init__(self, patients: Sequence[str], resamples: int = 2000, seed: int = 0):
        if not len(patients):
            raise ValueError("`patients` is empty: there are no cases to resample")
        _, self.group = np.unique(np.asarray(patients), return_inverse=True)
        groups = int(self.group.max()) + 1
        draws = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples)
        self.weight = draws.astype(np.float32)
        self.size = np.bincount(self.group, minlength=groups).astype(np.float32)

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        """95 % percentile interval of the mean of per-case values (N,); NaN for cases that have none."""
        low, high = np.nanquantile(self.means(values), [0.025, 0.975])
        return float(low), float(high)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean of each resample, of the cases that have a value."""
        has = ~np.isnan(values)
        sums = np.bincount(self.group[has], weights=values[has], minlength=len(self.size))
        size = self.size if has.all() else np.bincount(self.group[has], minlength=len(self.size))
        with np.errstate(invalid="ignore"):  # a resample in which no case has a value is left out
            return (self.weight @ sums) / (self.weight @ size)

    def error(self, values: np.ndarray) -> float:
        """Standard error of the mean of per-case values (N,)."""
        return float(self.means(values).std())

    def difference(self, values: np.ndarray) -> dict[str, Any]:
        """Mean of paired per-case differences (N,) with its interval."""
        return {"value": float(values.mean()), "ci95": list(self.interval(values))}

    def ratio(self, parts: np.ndarray, wholes: np.ndarray) -> dict[str, Any]:
        """Sum of per-case parts over sum of wholes, both (N,), with its interval: a mean over cells, not cases."""
        sums, sizes = (
            self.weight @ np.bincount(self.group, weights=v, minlength=len(self.size)) for v in (parts, wholes)
        )
        low, high = np.nanquantile(
            np.divide(sums, sizes, out=np.full_like(sums, np.nan), where=sizes > 0), [0.025, 0.975]
        )
        return {"value": float(parts.sum() / wholes.sum()), "ci95": [float(low), float(high)]}
