"""Work that is shared out over the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
R = TypeVar("R")


def shared_out(items: Sequence[T], work: Callable[[list[T]], Sequence[R]]) -> list[R]:
    """What `work` gives for each item, in order; every process does its part and gets the whole.

    Args:
        items: the same on every process. work: one result an item.
    """
    state = PartialState()
    mine = list(range(len(items)))[state.process_index :: state.num_processes]
    own = list(zip(mine, work([items[i] for i in mine]), strict=True))
    found = gather_object(own) if state.num_processes > 1 else own
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]
