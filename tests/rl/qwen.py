"""A small Qwen2.5-VL world in which TRL's GRPOTrainer and ours can be run side by side.

Run as a script it trains both in as many processes as it is launched in, once for each of a JSON list of settings, and
prints their logs as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOTrainer

from frugalpath.models.build import LORA_TARGETS
from frugalpath.models.qwen_vl import (
    VIDEO_TOKEN,
    VISION_MARKS,
    QwenProcessor,
    backbone,
    freeze_vision,
    load_qwen,
    small_qwen,
)
from frugalpath.models.tokenizer import train_tokenizer
from frugalpath.recipe.grpo import GroupConfig
from frugalpath.rl.trainer import GroupTrainer
from tests.conftest import noise

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QUESTIONS = ("Tumour?", "Which grade has this tumour, and why?", "Is there any necrosis?", "What is it? " * 8)
"""The last is so much longer than the others that it does not share a forward with them."""
IMAGES = {
    "mixed": ([(56, 84)], [], [(84, 56), (56, 56)], [(112, 84)]),
    "images": ([(56, 84)], [(56, 56)], [(84, 56), (56, 56)], [(112, 84)]),
    "text": ([], [], [], []),
}
"""Width and height of the images of each row."""
PIXELS = 784
"""Of one visual token."""
SHORT_RUN = {
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 0,
}
"""Arguments of every trainer of these tests."""


def make_processor() -> QwenProcessor:
    tokenizer = train_tokenizer(["grade tumour carcinoma necrosis"], 300, VISION_MARKS)
    tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)  # the last, as `Forced` depends on the ids of the others
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS * 16}
    return QwenProcessor(Qwen2VLImageProcessorPil(size=size), tokenizer)


def make_model(processor: QwenProcessor, freeze: bool = True, attention: str = "sdpa", text_only: bool = False) -> Any:
    """Always of the same weights, large enough that log-probabilities differ and that images are heard."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    text = {
        **TEXT,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.15,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if text_only:
        config = AutoConfig.for_model("qwen2", tie_word_embeddings=False, **text)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = small_qwen(tokenizer, text, {"window_size": 56}, attention)
    for weight in model.model.visual.parameters():
        if weight.ndim > 1:
            weight.data.mul_(4)
    if freeze:
        freeze_vision(model)
    return model


def make_rows(kind: str = "mixed") -> Dataset:
    rows = []
    for i, (question, sizes) in enumerate(zip(QUESTIONS, IMAGES[kind], strict=True)):
        images = [noise(w, h, 10 * i + k) for k, (w, h) in enumerate(sizes)]
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": question}]}
        rows.append(row if kind == "text" else {**row, "images": images})
    return Dataset.from_list(rows)


def even_tokens(completions: list, completion_ids: list, **columns: Any) -> list[float]:
    """The share of even tokens; equal for completions that start with 4."""
    return [0.5 if ids[0] == 4 else sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


class Forced:
    """Completions that depend on the prompt, the row and the step alone, of unequal length, one in five cut off."""

    silent = 0
    """Share of the prompts, in tenths, whose completions are all rewarded alike."""

    def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> tuple[list, None]:
        out = []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([self.state.global_step, row % self.num_generations, len(ids), sum(ids)])
            words = rng.integers(10, 200, rng.integers(1, 7)).tolist()
            quiet = (sum(ids) + 3 * self.state.global_step) % 10 < self.silent
            end = [self._tokenizer.eos_token_id] if rng.random() < 0.8 else []
            out.append([4 if quiet else 5, *words, *end])
        return out, None


class Stock(Forced, GRPOTrainer):
    """TRL's trainer on forced completions. It shuffles groups, so that its micro-batches are those of ours."""

    whole_groups = True

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if not self.whole_groups:
            return super()._prepare_inputs(generation_batch)
        with patch("trl.trainer.grpo_trainer.shuffle_sequence_dict", _shuffle_groups):
            return super()._prepare_inputs(generation_batch)


def _shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    groups: dict[tuple, list[int]] = {}
    for row, ids in enumerate(batch["prompt_ids"].tolist()):
        groups.setdefault(tuple(ids), []).append(row)
    rows = list(groups.values())
    order = [row for g in torch.randperm(len(rows)).tolist() for row in rows[g]]
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            out[key] = value[order] if value.ndim else value
        else:
            out[key] = [value[row] for row in order]
    return out


class Ours(Forced, GroupTrainer):
    """Ours on the same completions."""


def make_trainer(
    kind: type,
    folder: str,
    lora: bool | str = False,
    silent: int = 0,
    freeze: bool = True,
    rows: str = "mixed",
    text_only: bool = False,
    attention: str = "sdpa",
    reward: Any = even_tokens,
    evaluate: bool = False,
    dataset: Dataset | None = None,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of `kind` whose batch is 4 prompts x 4 completions.

    Args:
        lora: adapters of the language model, or "all-linear" for those of the vision tower as well.
        evaluate: the training rows are the evaluation's too.
        more: further arguments of the trainer.
        changes: of `GroupConfig`.
    """
    processor = make_processor()
    options = {
        **SHORT_RUN,
        "output_dir": folder,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_steps": 5,
        "disable_dropout": True,
    }
    model = make_model(processor, freeze, attention, text_only)
    if changes.get("beta") and not lora:
        # The reference is loaded anew from where the model came from.
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder) if text_only else load_qwen(folder)
        if freeze and not text_only:
            freeze_vision(model)
    targets = LORA_TARGETS if lora is True else lora
    dataset = dataset or make_rows("text" if text_only else rows)
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=GroupConfig(**{**options, **changes}),
        train_dataset=dataset,
        eval_dataset=dataset if evaluate else None,
        processing_class=processor.tokenizer if text_only else processor,
        peft_config=LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        if lora
        else None,
        **(more or {}),
    )
    trainer.silent = silent
    return trainer


def steps(trainer: Any) -> list[dict[str, float]]:
    """Logs of a trained trainer, a row for each optimizer step."""
    return [row for row in trainer.state.log_history if "grad_norm" in row]


def train(kind: type, folder: str, **changes: Any) -> list[dict[str, float]]:
    """Logs of a short run."""
    trainer = make_trainer(kind, folder, **changes)
    trainer.train()
    return steps(trainer)


def assert_same(
    ours: list[dict[str, float]],
    stock: list[dict[str, float]],
    rel: float = 1e-4,
    floor: float = 1e-6,
    silent: bool = False,
) -> None:
    """All that two runs logged is equal, but times.

    Args:
        silent: groups without advantage may be left out of entropy and clip ratios.
    """
    assert len(ours) == len(stock) > 0
    assert max(row["grad_norm"] for row in stock) > 1e-3, "there was something to learn"
    for own, other in zip(ours, stock, strict=True):
        assert own.keys() == other.keys()
        apart = {k for k in other if k == "step_time" or (silent and k.startswith(("entropy", "clip_ratio")))}
        for key in sorted(other.keys() - apart):
            assert own[key] == pytest.approx(other[key], rel=rel, abs=floor), f"step {other['step']}: {key}"


class Pass(NamedTuple):
    """A forward of a model."""

    scored: bool
    """For log-probabilities; otherwise it is part of the generation."""
    grad: bool
    tokens: int
    """Without padding."""


class Watch:
    """Forwards of a trainer's model and images that pass its vision tower and its image processor."""

    def __init__(self, trainer: Any):
        self.passes: list[Pass] = []
        self.tower: list[int] = []
        """Patches of each call of the tower."""
        self.processed = 0
        """Images."""
        self._pad = trainer._tokenizer.pad_token_id
        trainer.model.register_forward_pre_hook(self._read, with_kwargs=True)
        if not hasattr(trainer.processing_class, "image_processor"):
            return
        backbone(trainer.model).visual.register_forward_pre_hook(self._see, with_kwargs=True)
        # Instances share their class's `__call__`, which ends in `preprocess`.
        processor = trainer.processing_class.image_processor
        stock = processor.preprocess

        def preprocess(images: Any, *rest: Any, **options: Any) -> Any:
            self.processed += len(images)
            return stock(images, *rest, **options)

        processor.preprocess = preprocess

    @property
    def scored(self) -> list[Pass]:
        return [p for p in self.passes if p.scored]

    def _read(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids = kwargs["input_ids"]
        read = Pass(kwargs.get("labels") is not None, torch.is_grad_enabled(), int((ids != self._pad).sum()))
        self.passes.append(read)

    def _see(self, module: Any, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["hidden_states"]
        self.tower.append(len(pixels))


if __name__ == "__main__":
    logs = []
    for settings in json.loads(sys.argv[1]):
        with tempfile.TemporaryDirectory() as out:
            logs.append({kind.__name__: train(kind, out, **settings) for kind in (Stock, Ours)})
    if torch.distributed.get_rank() == 0:
        print("LOGS " + json.dumps(logs))
