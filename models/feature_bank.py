"""Visual tokens of a field of view or slide: at most `budget` tokens and their places."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import PLACE, Tokens
from frugalpath.models.compressors.pool import Pool
from frugalpath.slides.field_store import StoredField, count_stored, load_stored, stored_dim
from frugalpath.slides.store import Features

COLUMNS = PLACE + 1
"""Columns that follow the features of a token: centre x, centre y and side as shares of the field; patches in it."""
CACHE_MB = 2048
"""Memory for compressed tokens, in MiB."""


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """Visual tokens of one image or slide, or the tokens that a model makes them of.

    Args:
        rows: (n, d + 4) float32; d feature columns, then `COLUMNS`.
        budget: tokens that were asked for.
        source: path of the image or slide.
        realised: visual tokens that the model gets of it; n where it takes the rows as they are.
        in_text: how many of them stand in the text; None for all.
        slide: number among the slides of its case, from 0.
        question: (T,) token ids of the question, for a model that looks with it in mind.
    """

    rows: torch.Tensor
    budget: int
    source: str
    realised: int | None = None
    in_text: int | None = None
    slide: int = 0
    question: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens if self.in_text is None else self.in_text

    @property
    def tokens(self) -> int:
        """Visual tokens that it costs."""
        return len(self.rows) if self.realised is None else self.realised

    def __deepcopy__(self, memo: dict) -> VisualTokens:
        # Trainers deep-copy whole prompts; the tensor is never written to, so one copy serves all completions.
        return self

    def __reduce__(self) -> tuple:
        # A trainer's log gathers prompts over processes: a description is enough there, features would be many MB.
        return str, (f"{self.source} as {self.tokens} tokens",)


class FeatureBank:
    """Stored features of the cases' images and slides, compressed to a budget; every one is made once.

    Args:
        files: feature file (HDF5), or place in a store of fields, of each image or slide path.
        cache_mb: memory for compressed tokens, in MiB; the least recently used go first.
        missing: slides of the cases without features, and why; they are not shown.
    """

    def __init__(
        self,
        files: Mapping[str, str | StoredField],
        cache_mb: int = CACHE_MB,
        missing: dict[str, str] | None = None,
    ):
        self.files, self.missing = dict(files), missing or {}
        self.cache_bytes = cache_mb * 2**20
        self._made: OrderedDict[tuple[str, Hashable, int], VisualTokens] = OrderedDict()
        self._held = 0
        self._counts: dict[str, int] = {}

    @cached_property
    def dim(self) -> int:
        """Width d of the stored features; set by what reads them where there are none yet."""
        return stored_dim(next(iter(self.files.values())))

    def add(self, other: FeatureBank) -> None:
        """Take in the sources of another bank, whose features are as wide.

        Raises:
            InputError: they are not.
        """
        known = self.files or "dim" in vars(self)  # empty banks of models with a vision tower know no width
        if other.files and known and other.dim != self.dim:
            raise InputError(
                f"features of new cases are {other.dim} wide, those of the others {self.dim}; use the same encoder"
            )
        self.files |= other.files
        self.missing |= other.missing

    def load(self, source: str) -> Features:
        """All stored features of a source."""
        return load_stored(self.files[source])

    def count(self, source: str) -> int:
        """Stored features of a source."""
        if source not in self._counts:
            self._counts[source] = count_stored(self.files[source])
        return self._counts[source]

    def see(self, source: str, budget: int) -> VisualTokens:
        """Pooled tokens of a source at a budget (at least 1)."""
        return self.see_all(source, [budget])[0]

    def see_all(self, source: str, budgets: Sequence[int]) -> list[VisualTokens]:
        """Pooled tokens of a source at several budgets; its file is read once."""
        return self.prepare(source, budgets, '["pool"]', lambda tokens, b: Pool(tokens.features.shape[-1])(tokens, b))

    def prepare(
        self, source: str, budgets: Sequence[int], name: Hashable, compress: Callable[[Tokens, int], Tokens]
    ) -> list[VisualTokens]:
        """Tokens of a source at several budgets; its file is read once, and what is made is kept under a name.

        Args:
            compress: the source's patches, places in pixels, to at most so many tokens.
        """
        found = {b: self._find((source, name, b)) for b in budgets}
        if None in found.values():
            rows, scale = patch_rows(self.load(source))
            patches = Tokens.from_rows([rows])
            for budget in (b for b, tokens in found.items() if tokens is None):
                (made,) = compress(patches, budget).rows()
                made[:, -COLUMNS:] /= scale
                found[budget] = self._keep(name, VisualTokens(made, budget, source))
        return [tokens for b in budgets if (tokens := found[b]) is not None]

    def _find(self, key: tuple[str, Hashable, int]) -> VisualTokens | None:
        if key in self._made:
            self._made.move_to_end(key)
        return self._made.get(key)

    def _keep(self, name: Hashable, tokens: VisualTokens) -> VisualTokens:
        self._made[tokens.source, name, tokens.budget] = tokens
        self._held += tokens.rows.nbytes
        while self._held > self.cache_bytes and len(self._made) > 16:
            _, old = self._made.popitem(last=False)
            self._held -= old.rows.nbytes
        return tokens


def patch_rows(stored: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored features as rows (N, d + 4), places in pixels, and what their last columns are divided by for shares."""
    ones = np.ones((len(stored), 1))
    rows = np.concatenate([stored.features, cells(stored), ones], axis=1, dtype=np.float32)
    return torch.from_numpy(rows), torch.from_numpy(np.append(extent(stored), 1.0)).float()


def cells(stored: Features) -> np.ndarray:
    """Squares of the stored features as (N, 3): centre x, centre y and side, in level-0 pixels."""
    size = float(stored.attrs["patch_size"])
    centre = stored.coords.astype(np.float64) + size / 2
    return np.concatenate([centre, np.full((len(centre), 1), size)], axis=1)


def extent(stored: Features) -> np.ndarray:
    """What centres and sides are divided by to give shares of the field: width, height and the longer of them."""
    # Files of other toolkits may not state the slide's size; the patches' own extent stands in for it.
    end = stored.coords.max(0) + float(stored.attrs["patch_size"])
    width = float(stored.attrs.get("width", end[0]))
    height = float(stored.attrs.get("height", end[1]))
    return np.array([width, height, max(width, height)])
