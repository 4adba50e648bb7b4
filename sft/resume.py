"""Training that goes on from a checkpoint, of any trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback


class _AllTrained(Exception):
    """The checkpoint is of the last step."""


class _NoStepMore(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, with weights and state of the checkpoint in place."""
        if state.global_step >= state.max_steps:
            raise _AllTrained


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint on if there is one.

    From one of the last step nothing is trained: transformers would take a step more where that is amid an epoch.
    On a CPU the same training gives the same weights, bit for bit, with any one number of threads (`repeatable`).

    Args:
        checkpoint: its folder.
    """
    trainer.add_callback(_NoStepMore())
    with repeatable():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except _AllTrained:
            trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums whose order is fixed, where this is cheap: on a CPU.

    There one kernel of those tried adds in whatever order its threads come, that of the gradient of `x[rows]`; torch's
    deterministic one is no slower. On a GPU many kernels do, and their substitutes are slower or missing:
    `full_determinism` of the trainer's arguments asks for them, and is left as it is.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if torch.accelerator.is_available() or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it makes errors visible, not results the same
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
