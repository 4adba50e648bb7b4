"""Compressors in a row, as a recipe names them: those without parameters first, then those that the model trains."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Compressor, Tokens

COMPRESSORS = {
    "pool": "frugalpath.models.compressors.pool:Pool",
    "keep": "frugalpath.models.compressors.aligner:Keep",
    "stm": "frugalpath.models.compressors.stm:SparseTokenMerger",
    "resampler": "frugalpath.models.compressors.resampler:Resampler",
    "importance": "frugalpath.models.compressors.importance:ImportanceScorer",
    "qformer": "frugalpath.models.compressors.qformer:QFormer",
}


def make_compressor(spec: str | Mapping[str, Any], dim: int, hidden: int) -> Compressor:
    """A compressor from its name, or a mapping of `name` and options.

    Args:
        dim: width of the tokens that it gets. hidden: width of the language model.

    Raises:
        InputError: an unknown name or option, or no token at all.
    """
    if not isinstance(spec, str | Mapping):
        raise InputError(f"performer.compressors: {spec!r} is neither a name nor a mapping of `name` and options")
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in COMPRESSORS:
        raise InputError(f"performer.compressors: {name!r} is unknown; use one of {', '.join(COMPRESSORS)}")
    module, _, kind = COMPRESSORS[name].partition(":")
    make = getattr(importlib.import_module(module), kind)
    parameters = inspect.signature(make).parameters
    own = set(parameters)
    unknown = sorted(set(options) - own | set(options) & {"dim", "hidden"})
    if unknown:
        raise InputError(
            f"performer.compressors: {name} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(own - {'dim', 'hidden'})) or 'none'}"
        )
    for key, value in options.items():
        if parameters[key].annotation in ("int", "float") and isinstance(value, bool | str | None):
            raise InputError(f"performer.compressors: {name}: {key} {value!r}: must be a number")
        if parameters[key].annotation == "bool" and not isinstance(value, bool):
            raise InputError(f"performer.compressors: {name}: {key} {value!r}: must be true or false")
    if options.get("most", 1) < 1:
        raise InputError(f"performer.compressors: {name}: most {options['most']}: must be at least 1")
    given = {"dim": dim, "hidden": hidden}
    return make(**{k: v for k, v in given.items() if k in own}, **options)


class Chain(nn.Module):
    """Compressors one after another. The budget is the last one's; those before it give as much as they do.

    Args:
        specs: see `make_compressor`. dim: width of the patch features. hidden: of the language model.

    Raises:
        InputError: none at all, or one without parameters after one that has some.
    """

    def __init__(self, specs: Sequence[str | Mapping[str, Any]], dim: int, hidden: int):
        super().__init__()
        if not specs:
            raise InputError("performer.compressors: the list is empty; name at least one, such as pool")
        stages: list[Compressor] = []
        for spec in specs:
            stages.append(make_compressor(spec, stages[-1].out_dim if stages else dim, hidden))
        order = [stage.learned for stage in stages]
        if order != sorted(order):
            raise InputError(
                f"performer.compressors: {list(specs)}: those without parameters (pool, keep, stm) come before the "
                "learned ones"
            )
        self.fixed = [stage for stage in stages if not stage.learned]
        self.learned = nn.ModuleList(stage for stage in stages if stage.learned)
        self.out_dim = stages[-1].out_dim
        self.asks = any(stage.asks for stage in stages)

    def prepare(self, tokens: Tokens, budget: int) -> Tokens:
        """What the model gets of a slide: the stages without parameters, at the budget if no other follows."""
        for at, stage in enumerate(self.fixed):
            last = at + 1 == len(self.fixed) and not self.learned
            tokens = stage(tokens, budget if last else stage.most)
        return tokens

    def room(self, n: int) -> int:
        """Tokens that a slide of n patches gives at most, whatever its budget."""
        if self.learned:
            return self.learned[-1].most  # type: ignore[return-value]
        for at, stage in enumerate(self.fixed):
            n = stage.room(n) if at + 1 == len(self.fixed) else min(stage.most, stage.room(n))
        return n

    def count(self, n: int, budget: int) -> int:
        """Tokens that come of the n that `prepare` gave."""
        for stage, share in self._budgets(budget):
            n = stage.count(n, share)
        return n

    def flops(self, n: int, budget: int) -> float:
        """FLOPs of the learned stages for one slide of n prepared tokens."""
        total = 0.0
        for stage, share in self._budgets(budget):
            total += stage.flops(n, share)
            n = stage.count(n, share)
        return total

    def forward(self, tokens: Tokens, budget: int, question: torch.Tensor | None = None) -> Tokens:
        for stage, share in self._budgets(budget):
            tokens = stage(tokens, share, question)
        return tokens

    def _budgets(self, budget: int) -> list[tuple[Any, int]]:
        return [(s, budget if s is self.learned[-1] else s.most) for s in self.learned]
