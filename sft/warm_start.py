"""SFT warm start: answers only, at random budgets of the ladder, so that every budget is in distribution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from envs.case import Case
from models.performer import Performer
from models.sight import stack_positions
from rewards.registry import gold_completion


def gold_ids(tokenizer: Any, case: Case) -> list[int]:
    """Token ids of a case's gold completion, its end token with them."""
    text = gold_completion({"answer": case.answer}) + tokenizer.eos_token
    return tokenizer(text, add_special_tokens=False)["input_ids"]


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
        performer = self.performer
        tokenizer, sight = performer.processor.tokenizer, performer.processor.sight
        prompts = [performer.prompt(c, budget) for c in cases]
        rows: dict[str, list[torch.Tensor]] = {"input_ids": [], "attention_mask": [], "labels": []}
        places: list[torch.Tensor] = []
        for prompt, case in zip(prompts, cases, strict=True):
            written = torch.tensor(gold_ids(tokenizer, case))
            after = prompt.next_position + torch.arange(len(written))
            rows["input_ids"].append(torch.cat([prompt.ids, written]))
            rows["attention_mask"].append(torch.ones(len(prompt) + len(written), dtype=torch.long))
            rows["labels"].append(torch.cat([torch.full_like(prompt.ids, -100), written]))
            places.append(torch.cat([prompt.positions, after.expand(len(prompt.positions), -1)], 1))
        fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        inputs = {k: pad_sequence(v, batch_first=True, padding_value=fill[k]) for k, v in rows.items()}
        seen = sight.inputs(performer.model, [p.views for p in prompts])
        return {**inputs, "position_ids": stack_positions(places), **seen}


def train_sft(
    performer: Performer,
    cases: Sequence[Case],
    ladder: Sequence[int],
    args: SFTConfig,
    text_only: float = 0.05,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
    lora: LoraConfig | None = None,
) -> SFTTrainer:
    """Fine-tune the performer in place on the gold answers of `cases`; returns the trainer with its log.

    Args:
        lora: train through adapters, which are merged into the weights at the end.
    """
    trainer = SFTTrainer(
        model=performer.model,
        args=args,
        data_collator=BudgetCollator(performer, cases, ladder, text_only, args.seed),
        train_dataset=Dataset.from_dict({"index": list(range(len(cases)))}),
        processing_class=performer.processor,
        callbacks=list(callbacks),
        peft_config=lora,
    )
    trainer.train(resume_from_checkpoint=resume)
    if lora is not None:
        performer.model = merged(trainer)
    return trainer


def merged(trainer: Any) -> Any:
    """The trained model without its adapters, their weights added to its own."""
    return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()


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
