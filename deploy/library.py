"""A trained run in a program of the user's: performer and allocator by their folder, for cases that they never saw."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import frugalpath.allocator.base as base
import frugalpath.models.performer as models
from frugalpath.deploy.run import deployed, feature_folder, trained_performer
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.recipe.data import RunData
from frugalpath.recipe.features import load_features
from frugalpath.recipe.finished import check_finished, operating_price
from frugalpath.recipe.run import Run, parse_recipe


class Trained(ABC):
    """What a run's folder holds, with the run's encoder: images and slides are encoded when they are first shown.

    Args:
        run: finished. Features are read from its feature folder and added to it, or lie in a temporary one where that
            may not be written.
    """

    def __init__(self, run: Run):
        self.run = run
        self._held = ExitStack()
        self._folder = feature_folder(run, self._held)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *recipe: str) -> Self:
        """Read a folder that a run or `frugalpath publish` wrote.

        Args:
            recipe: what the run was given beside its recipe file, such as "--set", "allocator.form=policy".

        Raises:
            InputError: the run is not finished, or was trained with other settings.
        """
        kept = Path(folder) / "recipe.yaml"
        if not kept.is_file():
            raise InputError(f"{folder}: has no recipe.yaml; name the output_dir of a run, or what was published")
        return cls(parse_recipe(["--config", str(kept), "--output_dir", str(folder), *recipe]))

    @property
    @abstractmethod
    def bank(self) -> FeatureBank:
        """Stored features of all that was shown."""

    @property
    def ladder(self) -> list[int]:
        """Budgets that the run was trained at, in tokens."""
        return self.run.ladder

    def encode(self, cases: Sequence[Case]) -> None:
        """Make the features of what has not been shown yet; many cases at once are faster than one after another.

        Raises:
            InputError: an image or slide cannot be read.
        """
        known = self.bank.files.keys() | self.bank.missing.keys()
        new = [case for case in cases if not known.issuperset((*case.images, *case.slides))]
        if new:
            self.bank.add(load_features(new, self.run.encoder, self._folder))

    def _check_budget(self, budget: int) -> None:
        if not 0 <= budget <= self.ladder[-1]:
            raise InputError(f"budget {budget} must be in 0..{self.ladder[-1]}, the largest of the run's ladder")


class Performer(Trained):
    """A trained performer: `Performer.from_pretrained("runs/demo").answer([case], [16])`."""

    def __init__(self, run: Run):
        check_finished(run, allocator=False)
        super().__init__(run)
        self.inner: models.Performer = trained_performer(run, FeatureBank({}))

    @property
    def bank(self) -> FeatureBank:
        return self.inner.bank

    @property
    def model(self) -> Any:
        """The model, as transformers and TRL take it."""
        return self.inner.model

    @property
    def processor(self) -> Any:
        """Its processor, the tokenizer within."""
        return self.inner.processor

    def answer(
        self, cases: Sequence[Case], budgets: Sequence[int], max_new_tokens: int | None = None, batch_size: int = 64
    ) -> list[models.Answer]:
        """Greedy answers of the cases, each at its own budget in tokens; 0 shows no image.

        Args:
            max_new_tokens: at most so many are written; the run's own by default.

        Raises:
            InputError: an image or slide cannot be read, or a budget is beyond the ladder.
        """
        for budget in budgets:
            self._check_budget(budget)
        self.encode(cases)
        most = max_new_tokens or RunData(self.run, {}).max_new_tokens
        return self.inner.answer(cases, budgets, most, batch_size)


class Allocator(Trained):
    """A fitted allocator with its performer: `Allocator.from_pretrained("runs/demo").answer(case, price=0.1)`."""

    def __init__(self, run: Run):
        super().__init__(run)
        self.inner: base.Allocator = deployed(run, [], self._folder)

    @property
    def bank(self) -> FeatureBank:
        return self.inner.performer.bank

    @property
    def price(self) -> float:
        """The price that the run's report chose."""
        return operating_price(self.run)

    def choose(self, cases: Sequence[Case], price: float | None = None) -> list[int]:
        """Budgets of the cases in tokens at a price, by default the report's; arguments as for `answer`.

        The form `cascade` answers while it chooses, so that this costs as much as to answer.
        """
        price = self._priced(price)
        self.encode(cases)
        return [self.ladder[rung] for rung in self.inner.choose(cases, price)[0]]

    def answer(self, case: Case, price: float | None = None) -> base.Answered:
        """Look, choose a budget and answer.

        Args:
            price: score that the largest budget's cost is worth; by default what the report chose.

        Raises:
            InputError: an image or slide cannot be read, or the price is none.
        """
        price = self._priced(price)
        self.encode([case])
        return self.inner.answer(case, price)

    def answer_at(self, case: Case, budget: int) -> base.Answered:
        """Answer at a budget that nothing chooses, in tokens.

        Raises:
            InputError: an image or slide cannot be read, or the budget is beyond the ladder.
        """
        self._check_budget(budget)
        self.encode([case])
        return self.inner.answer_at(case, budget)

    def _priced(self, price: float | None) -> float:
        found = self.price if price is None else price
        if not (found >= 0 and math.isfinite(found)):
            raise InputError(f"price {found} must be 0 or more")
        return found
