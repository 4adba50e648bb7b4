"""Training on slides and their texts: PathAlign's first stage (methods 4.2), or its R variant with ITC alone.

Other pairs of a batch are the negatives. With several processes they are those of the same process: nothing is
gathered, so that a process's batch should be large by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import PLACE, Tokens
from frugalpath.models.slide_text import LOSSES, SlideTextConfig, SlideTextModel, text_batch
from frugalpath.recipe.checkpoints import train_from
from frugalpath.recipe.sft import training_arguments

STANDARDISED = 256
"""Number of slides used for the mean and deviation that standardise a new model's features."""


def build_model(
    slides: Sequence[torch.Tensor], tokenizer: Any, shape: dict[str, Any], seed: int = 0
) -> SlideTextModel:
    """Build a new model for the tokenizer's texts, which standardises features by these slides.

    Args:
        slides: rows (n_i, d + 4) of training slides, see `Tokens.from_rows`.
        shape: keys of `SlideTextConfig` other than `feature_dim` and `vocab_size`.

    Raises:
        InputError: an unknown key, or there is no slide.
    """
    known = set(inspect.signature(SlideTextConfig).parameters) - {"feature_dim", "vocab_size", "kwargs"}
    unknown = sorted(set(shape) - known)
    if unknown:
        raise InputError(f"slide_text: unknown key {', '.join(unknown)}; use one of {', '.join(sorted(known))}")
    if not len(slides):
        raise InputError("slide_text: there is no slide to train on")
    torch.manual_seed(seed)
    chosen = [slides[i] for i in range(0, len(slides), max(1, len(slides) // STANDARDISED))]
    width = chosen[0].shape[1] - PLACE - 1
    model = SlideTextModel(SlideTextConfig(feature_dim=width, vocab_size=len(tokenizer), **shape))
    model.qformer.embed.standardise(torch.cat([rows[:, :width] for rows in chosen]))
    return model


class PairCollator:
    """Collate pairs into a batch for `SlideTextModel`, with patches and tokens padded on the right.

    Args:
        slides: rows (n_i, d + 4) of each slide; may be a lazy sequence.
        texts: texts of the slides, in the same order.
        length: maximum number of tokens of a text.
        patches: of a slide at most in a batch, drawn anew each time; None takes all. Fewer are quicker, and a slide
            is then never seen twice alike.
        seed: random seed of the patches.
    """

    def __init__(
        self,
        slides: Sequence[torch.Tensor],
        texts: Sequence[str],
        tokenizer: Any,
        length: int,
        patches: int | None = None,
        seed: int = 0,
    ):
        self.slides, self.texts, self.tokenizer, self.length = slides, texts, tokenizer, length
        self.patches, self.seed = patches, seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        at = [row["index"] for row in rows]
        # The draw depends on the rows alone (each epoch shuffles them anew), so that a resumed run sees the same.
        draw = torch.Generator().manual_seed(hash((self.seed, *at)) % 2**63)
        tokens = Tokens.from_rows([self._some(self.slides[i], draw) for i in at])
        seen = {"features": tokens.features, "place": tokens.place, "size": tokens.size}
        return seen | text_batch(self.tokenizer, [self.texts[i] for i in at], self.length)

    def _some(self, slide: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        if self.patches is None or len(slide) <= self.patches:
            return slide
        return slide[torch.randperm(len(slide), generator=draw)[: self.patches]]


class ContrastiveTrainer(Trainer):
    """Trainer that also logs the mean of each loss."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._parts: dict[str, list[torch.Tensor]] = {}

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        loss, out = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            for name in LOSSES:
                if out.get(name) is not None:
                    self._parts.setdefault(name, []).append(out[name].detach())
        return (loss, out) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = {name: torch.stack(found).mean()[None] for name, found in self._parts.items()}
            logs = logs | {name: float(self.accelerator.gather(mean).mean()) for name, mean in means.items()}
            self._parts.clear()
        super().log(logs, start_time)


def train_contrastive(
    model: SlideTextModel,
    slides: Sequence[torch.Tensor],
    texts: Sequence[str],
    tokenizer: Any,
    args: TrainingArguments,
    patches: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
) -> Trainer:
    """Train the model in place on slide-text pairs; return the trainer with its log.

    Args:
        slides: rows (n_i, d + 4) of each slide, see `Tokens.from_rows`.
        texts: text of each slide.
        args: see `contrastive_config`.
        patches: see `PairCollator`.
        resume: checkpoint to resume from.

    Raises:
        InputError: fewer than two pairs, an empty text, or a tokenizer with more tokens than the model knows.
    """
    problems = []
    if len(slides) != len(texts):
        problems.append(f"contrastive: {len(slides)} slides and {len(texts)} texts; each slide needs its text")
    if len(slides) < 2:
        problems.append("contrastive: fewer than two pairs; each pair needs others to contrast with")
    empty = [str(i) for i, text in enumerate(texts) if not text.strip()]
    if empty:
        problems.append(f"contrastive: {len(empty)} texts are empty, the first is number {empty[0]} (from 0)")
    if len(tokenizer) > model.config.vocab_size:
        problems.append(
            f"contrastive: the tokenizer has {len(tokenizer)} tokens, the model knows {model.config.vocab_size}; use "
            "the tokenizer that the model was made with"
        )
    if problems:
        raise InputError(problems)
    trainer = ContrastiveTrainer(
        model=model,
        args=args,
        data_collator=PairCollator(slides, texts, tokenizer, model.config.text_length, patches, args.seed),
        train_dataset=Dataset.from_dict({"index": list(range(len(slides)))}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    train_from(trainer, resume)
    return trainer


def contrastive_config(output_dir: str | Path, options: dict[str, Any], seed: int) -> TrainingArguments:
    """`TrainingArguments` with `options` over the defaults, which are BLIP-2's, see `training_arguments`.

    Only BLIP-2's batch size, in the thousands (Li et al. 2023, section 3.4), is not adopted.
    """
    defaults = {
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 64,
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
    }
    return training_arguments(TrainingArguments, output_dir, options, seed, defaults)
