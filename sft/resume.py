"""Training that goes on from a checkpoint, of any trainer."""

from __future__ import annotations

from typing import Any

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

    Args:
        checkpoint: its folder.
    """
    trainer.add_callback(_NoStepMore())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except _AllTrained:
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
