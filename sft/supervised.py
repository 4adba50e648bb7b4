"""Supervised stages: gold answers at random budgets of the ladder, so that every budget is in distribution.

`warm_start` trains all weights (or adapters) at one learning rate. `align` trains what stands between patch features
and language model, on captions; `case` all of it, at a learning rate for each part (PathoSynVLM, methods 3.3).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.adapters import ADAPTER
from frugalpath.models.build import SEEING_PARTS
from frugalpath.models.cost import FlopCount
from frugalpath.models.performer import Performer
from frugalpath.models.sharded import make_ready, shares_out, whole
from frugalpath.models.vision_adapter import stack_positions
from frugalpath.recipe.checkpoints import train_from
from frugalpath.recipe.sft import training_arguments
from frugalpath.rewards.registry import gold_completion

RATES: dict[str, dict[str, float]] = {
    "align": {"seeing": 1e-4},
    "case": {"seeing": 1e-4, "lora": 2e-5, "language": 5e-6},
}
"""Published learning rates of the stages' parts (PathoSynVLM, methods 3.3); a part without one is frozen."""

PARTS = ("seeing", "lora", "language")

OWN_KEYS = ("questions", "learning_rates", "lora", "ladder", "text_only")
"""Keys of a stage that are not trainer arguments."""

LANGUAGE_WEIGHTS = "language.safetensors"
"""Checkpoint file with the weights trained besides the language model's adapters."""


def part_of(name: str) -> str | None:
    """Return which of `PARTS` a parameter belongs to.

    None for a vision tower, and for the original of a module that adapters have replaced.
    """
    path = name.split(".")
    if "original_module" in path or "visual" in path:
        return None
    if any(part in path for part in SEEING_PARTS):
        return "seeing"
    return "lora" if "lora_" in name else "language"


class StageTrainer(SFTTrainer):
    """`SFTTrainer` with a learning rate for each part of the model.

    Args:
        rates: learning rate by part, see `PARTS`; a part without one is frozen. None leaves all to the arguments.
    """

    def __init__(self, *args: Any, rates: Mapping[str, float] | None = None, **kwargs: Any):
        self.rates = rates
        super().__init__(*args, **kwargs)
        own = self.accelerator.unwrap_model(self.model)
        make_ready(own)
        self._flops = FlopCount(own)

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOPs of the language model for a batch, counted as those of GRPO are, see `FlopCount`."""
        self._flops.add(int(inputs["attention_mask"].sum()), update=True)
        return self._flops.take()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer and split each parameter group by part."""
        optimizer = super().create_optimizer(model)
        if self.rates is None:
            return optimizer
        names = {id(p): n for n, p in (self.model if model is None else model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            for part, rate in self.rates.items():
                own = [p for p in group["params"] if part_of(names[id(p)]) == part]
                if own:
                    groups.append({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = groups
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save a checkpoint, with the weights trained besides adapters, which PEFT leaves out."""
        super()._save(output_dir, state_dict)
        names = self._beside_adapters()
        if names and self.args.should_save:
            # Shared out over processes, the weights are gathered in `state_dict` only.
            given = self.model.state_dict() if state_dict is None else state_dict
            save_file(
                {name: given[name].contiguous() for name in names},
                Path(output_dir or str(self.args.output_dir)) / LANGUAGE_WEIGHTS,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._beside_adapters():
            weights = load_file(Path(resume_from_checkpoint) / LANGUAGE_WEIGHTS)
            (self.model if model is None else model).load_state_dict(weights, strict=False)

    def _beside_adapters(self) -> list[str]:
        if not isinstance(self.model, PeftModel):
            return []
        named = self.model.named_parameters()
        return [name for name, p in named if p.requires_grad and part_of(name) == "language"]


def gold_ids(tokenizer: Any, case: Case) -> list[int]:
    """Token ids of a case's gold completion, including the end token."""
    text = gold_completion({"answer": case.answer}) + tokenizer.eos_token
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class BudgetCollator:
    """Collate cases into an SFT batch: prompt at a random budget, gold completion, labels on the completion only.

    A batch is drawn at one budget, so that no row is padded to the tokens of another; over the steps the budgets are
    uniform on the ladder. A share of the rows sees no image at all, which keeps the text-only control in
    distribution.

    Args:
        ladder: budgets to draw from.
        text_only: share of batches without visual tokens.
    """

    def __init__(
        self,
        performer: Performer,
        cases: Sequence[Case],
        ladder: Sequence[int],
        text_only: float,
        seed: int,
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
        return {**inputs, "position_ids": stack_positions(places), **sight.typed(inputs["input_ids"]), **seen}


def train_sft(
    performer: Performer,
    cases: Sequence[Case],
    ladder: Sequence[int],
    args: SFTConfig,
    text_only: float = 0.05,
    callbacks: Sequence[TrainerCallback] = (),
    resume: str | None = None,
    lora: LoraConfig | None = None,
    rates: Mapping[str, float] | None = None,
) -> SFTTrainer:
    """Fine-tune the performer in place on the gold answers of `cases`; return the trainer with its log.

    Args:
        lora: train through adapters, which are merged into the weights at the end.
        rates: learning rate of each of `PARTS`; those without one are frozen. None trains all at that of `args`.

    Raises:
        InputError: the performer has none of the parts to train.
    """
    model = performer.model if lora is None else get_peft_model(performer.model, lora)
    if rates is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(rates.get(part_of(name) or "", 0.0) > 0)
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError(
                f"sft: learning_rates names {', '.join(rates)}, none of which the performer has, so nothing is "
                "trained; name other parts"
            )
    trainer = StageTrainer(
        model=model,
        args=args,
        data_collator=BudgetCollator(performer, cases, ladder, text_only, args.seed),
        train_dataset=Dataset.from_dict({"index": list(range(len(cases)))}),
        processing_class=performer.processor,
        callbacks=list(callbacks),
        rates=rates,
    )
    if shares_out(trainer.accelerator):
        performer.processor.sight.keep_tower(model, trainer.accelerator.device)
    train_from(trainer, resume)
    model = merged(trainer)
    if lora is not None:
        performer.model = model
    return trainer


def stage_rates(kind: str, given: Mapping[str, float] | None) -> dict[str, float] | None:
    """Learning rates of a stage: the published ones, overridden by the recipe; None if there are none.

    Raises:
        InputError: an unknown part, or no part is trained.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"sft: learning_rates: {given!r} is not a mapping of {', '.join(PARTS)} to rates")
    wrong = [
        f"{part}: {rate!r}" for part, rate in (given or {}).items() if not isinstance(rate, int | float) or rate < 0
    ]
    if wrong:
        raise InputError(f"sft: learning_rates: {', '.join(wrong)}: write numbers of at least 0, such as 1.0e-4")
    unknown = sorted(set(given or {}) - set(PARTS))
    if unknown:
        raise InputError(f"sft: learning_rates has no part {', '.join(unknown)}; it has {', '.join(PARTS)}")
    rates = {**RATES.get(kind, {}), **(given or {})}
    if rates and not any(rates.values()):
        raise InputError("sft: every learning rate is 0, so that nothing is trained; give one part a rate")
    return {part: rate for part, rate in rates.items() if rate} or None


def adapters_of(
    options: Mapping[str, Any], rates: Mapping[str, float] | None, lora: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Adapters that a stage trains: its own key `lora`, else the performer's where they have a learning rate.

    Args:
        options: keys of the stage.
        rates: see `stage_rates`.
        lora: adapters of the performer.
    """
    return options.get("lora", lora if rates is None or "lora" in rates else None)


def merged(trainer: Any) -> Any:
    """Gather the trained model on every process, with adapters saved in its folder and merged."""
    adapted = isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)
    if adapted:
        trainer.save_model(str(Path(trainer.args.output_dir) / ADAPTER))
    model = whole(trainer)
    return model.merge_and_unload() if adapted else model


def sft_config(output_dir: str | Path, options: dict[str, Any], seed: int) -> SFTConfig:
    """`SFTConfig` with the recipe's `sft` keys over the defaults, see `training_arguments`."""
    # TRL's own default is to recompute activations.
    defaults = {"learning_rate": 5e-4, "per_device_train_batch_size": 32, "gradient_checkpointing": False}
    fixed: dict[str, Any] = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return training_arguments(SFTConfig, output_dir, options, seed, defaults, **fixed)
