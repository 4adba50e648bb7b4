"""The `sft` part of a recipe: one stage or a list of them, each with its options and the arguments of its trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from frugalpath.errors import InputError

STAGES = ("mae", "contrastive", "align", "case", "warm_start")
WORDLESS = ("mae", "contrastive")
"""Stages that leave the language model out, so that nothing answers questions after them alone."""

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.01,
    "logging_steps": 50,
    "report_to": [],
    "bf16": False,
    "save_steps": 200,
    "save_total_limit": 2,
    # A batch without images leaves what sees unused.
    "ddp_find_unused_parameters": True,
}

OWN: dict[str, Any] = {
    "learning_rates": dict[str, float] | None,
    "text_only": float,
    "share": float,
    "decoder_width": int,
    "patches": int,
}
"""Numbers of the stages beside the arguments of their trainers, and their types."""

A = TypeVar("A", bound=TrainingArguments)


@dataclass(frozen=True)
class Stage:
    """One stage of supervised training.

    Args:
        kind: one of `STAGES`.
        name: its folder in the run's; the last stage's is `sft`.
        options: its keys in the recipe, without `stage`.
    """

    kind: str
    name: str
    options: dict[str, Any]

    @property
    def no_language_model(self) -> bool:
        """Whether it leaves the language model as it was."""
        return self.kind in WORDLESS


def read_stages(spec: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Stages of a recipe; a mapping is one stage, `warm_start` if it names no other.

    Raises:
        InputError: a stage that is not known, or an entry that is no mapping.
    """
    if not isinstance(spec, Mapping | list):
        raise InputError(f"sft: {spec!r} is neither a stage nor a list of them; give {{stage: align, max_steps: 100}}")
    entries = [spec] if isinstance(spec, Mapping) else list(spec)
    stages: list[Stage] = []
    for at, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise InputError(
                f"sft: entry {at + 1} is {entry!r}; give a mapping such as {{stage: align, max_steps: 100}}"
            )
        options = dict(entry)
        kind = options.pop("stage", "warm_start")
        if kind not in STAGES:
            raise InputError(f"sft: the stage {kind!r} is unknown; use one of {', '.join(STAGES)}")
        last = at + 1 == len(entries)
        repeated = sum(stage.kind == kind for stage in stages)
        stages.append(
            Stage(kind, "sft" if last else f"sft_{kind}" + (f"_{repeated + 1}" if repeated else ""), options)
        )
    return stages


def training_arguments(
    make: type[A],
    output_dir: str | Path,
    options: Mapping[str, Any],
    seed: int,
    defaults: Mapping[str, Any],
    **fixed: Any,
) -> A:
    """Arguments of a stage's trainer: what is fixed over a recipe's options over the stage's defaults over `DEFAULTS`.

    Raises:
        InputError: an option that the trainer does not have, or a value that it refuses.
    """
    fixed |= {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
    }
    try:
        return make(**{**DEFAULTS, **defaults, **options, **fixed})
    except (TypeError, ValueError) as error:
        raise InputError(f"sft: {error}; its keys are those of {make.__name__} and of the stage") from error
