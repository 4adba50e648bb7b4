"""Masked feature pre-training of a resampler: stage 0 of LoC-Path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from frugalpath.errors import InputError
from frugalpath.models.compressors.chain import Chain
from frugalpath.models.compressors.reconstruction import MaskedReconstruction
from frugalpath.models.compressors.resampler import Resampler
from frugalpath.models.modes import evaluating
from frugalpath.recipe.checkpoints import train_from
from frugalpath.recipe.sft import training_arguments


def train_mae(
    chain: Chain,
    rows: Sequence[torch.Tensor],
    ladder: Sequence[int],
    args: TrainingArguments,
    share: float = 0.75,
    decoder_width: int = 256,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
) -> Trainer:
    """Pre-train the chain's resampler in place; return the trainer with its log, whose model holds the decoder.

    Args:
        chain: compressors, of which the first learned one is the resampler, already standardised.
        rows: what `chain.prepare` gives of each slide, (n, d + 4): features, place as shares of the slide, size. Any
            object with a length that reads slides as they are asked for will do.
        ladder: numbers of latents, one of which is drawn at each step.
        share: share of masked tokens.

    Raises:
        InputError: no resampler, no slides, or an invalid share or ladder.
    """
    resampler = chain.learned[0] if chain.learned else None
    problems = []
    if not isinstance(resampler, Resampler):
        problems.append(
            "the mae stage pre-trains a resampler: name `resampler` first of the learned compressors in "
            "performer.compressors, or leave the stage out"
        )
    if not len(rows):
        problems.append("the mae stage has no slides to train on")
    if not 0 < share < 1:
        problems.append(f"mae: share {share}: must lie between 0 and 1")
    if not ladder or min(ladder) < 1:
        problems.append(f"mae: ladder {list(ladder)}: needs numbers of latents of at least 1")
    if problems or not isinstance(resampler, Resampler):
        raise InputError(problems)
    trainer = Trainer(
        model=MaskedReconstruction(resampler, share, ladder, decoder_width),
        args=args,
        train_dataset=rows,
        data_collator=_collate,
        callbacks=list(callbacks),
    )
    train_from(trainer, resume)
    return trainer


@torch.no_grad()
def measure_mae(
    model: MaskedReconstruction, rows: Sequence[torch.Tensor], budget: int, seed: int = 0
) -> dict[str, float]:
    """Measure how well masked tokens are reconstructed, preferably on slides not used for training.

    Returns:
        `loss`: mean squared error of the standardised features. `baseline`: that of predicting the mean of the same
        tokens, which is their variance. `slide_mean`: that of predicting the mean of the slide's visible tokens.
        `explained`: 1 - loss / baseline. `tokens`: patches that the hidden tokens stand for.
    """
    device = model.resampler.latents.device
    sums = torch.zeros(4, dtype=torch.float64)
    total = torch.zeros(len(model.resampler.patches.mean), dtype=torch.float64)
    with torch.random.fork_rng(), evaluating(model):
        torch.manual_seed(seed)
        for slide in rows:
            parts = model.reconstruct([slide.to(device)], budget)
            predicted, target, weight, known = (part[0].double().cpu() for part in parts)
            errors = (predicted - target, known - target, target)
            sums += torch.stack([*(weight @ (e**2).mean(1) for e in errors), weight.sum()])
            total += weight @ target
    weights = sums[3]
    if not weights:
        raise InputError("mae: no slide has more than one token: nothing can be masked and reconstructed")
    loss, slide_mean, square = (sums[:3] / weights).tolist()
    baseline = square - float(((total / weights) ** 2).mean())
    return {
        "loss": loss,
        "baseline": baseline,
        "slide_mean": slide_mean,
        "explained": 1 - loss / baseline,
        "tokens": float(weights),
    }


def _collate(batch: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    return {"rows": batch}


def mae_config(output_dir: str | Path, options: dict[str, Any], seed: int) -> TrainingArguments:
    """`TrainingArguments` with the recipe's `mae` keys over the defaults, see `training_arguments`."""
    defaults = {"learning_rate": 1e-3, "per_device_train_batch_size": 8}
    return training_arguments(TrainingArguments, output_dir, options, seed, defaults)
