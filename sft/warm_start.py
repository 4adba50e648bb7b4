"""SFT warm start: answers only, at random budgets of the ladder, so that every budget is in distribution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from envs.case import Case
from models.performer import Performer
from rewards.registry import gold_completion


class BudgetCollator:
    """Cases as an SFT batch: prompt at a drawn budget, gold completion, labels on the completion only.

    A batch is drawn at one budget, so that no row is padded to the tokens of another; over the steps the budgets are
    uniform on the ladder. A share of the rows sees no image at all, which keeps the text-only control in
    distribution.

    Args:
        ladder: budgets to draw from.
        text_only: share of batches without visual tokens.
    """

    def __init__(
        self, performer: Performer, cases: Sequence[Case], ladder: Sequence[int], text_only: float, seed: int
    ):
        self.performer, self.cases, self.ladder, self.text_only = performer, cases, list(ladder), text_only
        self.seed = seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # The draw depends on the rows alone (each epoch shuffles them anew), so that a resumed run sees the same.
        draw = random.Random(hash((self.seed, *(row["index"] for row in rows))))
        budget = 0 if draw.random() < self.text_only else draw.choice(self.ladder)
        return self.batch([self.cases[row["index"]] for row in rows], budget)

    def batch(self, cases: Sequence[Case], budget: int) -> dict[str, torch.Tensor]:
        """Model inputs of the cases at one budget, right-padded, with labels (B, T)."""
        processor = self.performer.processor
        tokenizer = processor.tokenizer
        seen = [self.performer.see(c, budget) for c in cases]
        prompts = [
            processor.apply_chat_template(self.performer.messages(c, v), add_generation_prompt=True)
            for c, v in zip(cases, seen, strict=True)
        ]
        texts = [
            p + gold_completion({"answer": c.answer}) + tokenizer.eos_token
            for p, c in zip(prompts, cases, strict=True)
        ]
        images = seen if any(seen) else None
        inputs = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        lengths = [len(ids) for ids in processor(images=images, text=prompts)["input_ids"]]
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, length in zip(labels, lengths, strict=True):
            row[:length] = -100
        return {**inputs, "labels": labels}


def train_sft(
    performer: Performer,
    cases: Sequence[Case],
    ladder: Sequence[int],
    args: SFTConfig,
    text_only: float = 0.05,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
) -> SFTTrainer:
    """Fine-tune the performer in place on the gold answers of `cases`; returns the trainer with its log."""
    trainer = SFTTrainer(
        model=performer.model,
        args=args,
        data_collator=BudgetCollator(performer, cases, ladder, text_only, args.seed),
        train_dataset=Dataset.from_dict({"index": list(range(len(cases)))}),
        processing_class=performer.processor,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sft_config(output_dir: str | Path, options: dict[str, Any], seed: int) -> SFTConfig:
    """`SFTConfig` with what the warm start needs fixed and the recipe's `sft` keys over the defaults."""
    defaults: dict[str, Any] = {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 10,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "save_steps": 200,
        "save_total_limit": 2,
    }
    fixed = {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTConfig(**{**defaults, **options, **fixed})
