"""Trace the memory of simulated work: what its tensors would take, moment by moment.

The work runs under `FakeTensorMode`, where operations make tensors of the right shape, type and lifetime without any
data. The result follows from the training code itself, not from a formula.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Moment:
    """One stretch of the work, in bytes: peak memory, and the share of weight gradients in it."""

    peak: float = 0.0
    gradients: float = 0.0


@dataclass
class Trace:
    """Memory of a piece of work, in bytes.

    Args:
        moments: by name, in order.
        kept: held after the forward pass for the backward; for generation, the full KV cache.
    """

    moments: dict[str, Moment] = field(default_factory=dict)
    kept: float = 0.0

    def deeper(self, other: Trace, layers: int) -> Trace:
        """Extrapolate to `layers` more layers; `other` is a trace of the same model with one more layer."""
        return other.plus(self, other, layers)

    def plus(self, before: Trace, after: Trace, times: float) -> Trace:
        """Add `times` the difference between two other traces."""
        grown = Trace(kept=self.kept + times * (after.kept - before.kept))
        for name, own in self.moments.items():
            if name in before.moments and name in after.moments:
                first, second = before.moments[name], after.moments[name]
                peak = own.peak + times * (second.peak - first.peak)
                gradients = own.gradients + times * (second.gradients - first.gradients)
                grown.moments[name] = Moment(peak, gradients)
        return grown


class Ledger(TorchDispatchMode):
    """Add up the memory of tensors created inside the context; views share their tensor's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.now = self.gradients = 0
        self._live: dict[int, Any] = {}
        self._moment = Moment()

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Exclude tensors that exist already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = storage

    def mark(self, name: str) -> None:
        """Begin a moment, or continue the one with this name."""
        self._moment = self.trace.moments.setdefault(name, Moment())
        self._note()

    def watch(self, parameter: torch.nn.Parameter) -> None:
        """Count this parameter's gradient separately from other tensors."""

        def arrived(tensor: torch.Tensor) -> None:
            assert tensor.grad is not None
            self.gradients += tensor.grad.nbytes
            self._note()

        parameter.register_post_accumulate_grad_hook(arrived)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                self._hold(made.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = weakref.ref(storage, self._released(key, size))
        self.now += size
        self._note()

    def _released(self, key: int, size: int) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            del self._live[key]
            self.now -= size

        return released

    def _note(self) -> None:
        if self.now > self._moment.peak:
            self._moment.peak, self._moment.gradients = self.now, self.gradients
