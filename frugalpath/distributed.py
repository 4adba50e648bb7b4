"""Work that is shared out over the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object

T = TypeVar("T")
R = TypeVar("R")


def is_main() -> bool:
    """Whether this process writes."""
    return PartialState().is_main_process


def map_over_processes(items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
    """What `work` gives for each item, in order; every process does its part and gets the whole.

    Args:
        items: the same on every process. work: one result an item.
    """
    state = PartialState()
    mine = list(range(len(items)))[state.process_index :: state.num_processes]
    own = list(zip(mine, work([items[i] for i in mine]), strict=True))
    found = gather_object(own) if state.num_processes > 1 else own
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Random numbers of the CPU (dropout, say) that are the same on every process; after it they go on as before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def renew(args: Any) -> None:
    """Make trainer arguments the process's own again, where those of an earlier trainer were made after them.

    Accelerate and transformers keep one DeepSpeed configuration a process; every trainer brings its own.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        AcceleratorState._reset_state()
        plugin.set_deepspeed_weakref()
