"""A small Qwen2.5-VL world in which TRL's GRPOTrainer and ours can be run side by side.

Run as a script it trains both in as many processes as it is launched in and prints their logs as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOTrainer

from models.build import LORA_TARGETS
from models.qwen_vl import VISION_MARKS, QwenProcessor, freeze_vision, load_qwen, small_qwen
from models.tokenizer import train_tokenizer
from rl.config import GroupConfig
from rl.trainer import GroupTrainer

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
QUESTIONS = ("Tumour?", "Which grade has this tumour, and why?", "Is there any necrosis?", "What is it?")
IMAGES = ([(56, 84)], [], [(84, 56), (56, 56)], [(112, 84)])
"""Width and height of the images of each row: one, none, two of different size, one."""


def noise(width: int, height: int, seed: int) -> Image.Image:
    """An image that no other seed has."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def make_processor() -> QwenProcessor:
    tokenizer = train_tokenizer(["grade tumour carcinoma necrosis"], 300, VISION_MARKS)
    return QwenProcessor(Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 16}), tokenizer)


def make_model(processor: QwenProcessor, freeze: bool = True, attention: str = "sdpa") -> Any:
    """Always of the same weights, large enough that log-probabilities differ."""
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
    model = small_qwen(tokenizer, text, {"window_size": 56}, attention)
    if freeze:
        freeze_vision(model)
    return model


def make_rows(copies: int = 1) -> Dataset:
    rows = []
    for copy in range(copies):
        for i, (question, sizes) in enumerate(zip(QUESTIONS, IMAGES, strict=True)):
            images = [noise(w, h, 100 * copy + 10 * i + k) for k, (w, h) in enumerate(sizes)]
            rows.append({"prompt": [{"role": "user", "content": question}], "images": images})
    return Dataset.from_list(rows)


def even_tokens(completions: list, completion_ids: list, **columns: Any) -> list[float]:
    """The share of even tokens; equal for completions that start with 4."""
    return [0.5 if ids[0] == 4 else sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]


class Forced:
    """Completions that depend on the prompt, the row and the step alone, of unequal length."""

    silent = 0
    """Share of the prompts, in tenths, whose completions are all rewarded alike."""

    def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> tuple[list, None]:
        eos = self.processing_class.tokenizer.eos_token_id
        out = []
        for row, ids in enumerate(prompt_ids):
            rng = np.random.default_rng([self.state.global_step, row % self.num_generations, len(ids), sum(ids)])
            words = rng.integers(10, 200, rng.integers(1, 7)).tolist()
            quiet = (sum(ids) + self.state.global_step) % 10 < self.silent
            out.append([4, *words, eos] if quiet else [5, *words, eos])
        return out, None


class Stock(Forced, GRPOTrainer):
    """TRL's trainer on forced completions."""


class Ours(Forced, GroupTrainer):
    """Ours on the same completions."""


def make_trainer(kind: type, folder: str, lora: bool = False, silent: int = 0, freeze: bool = True, **changes) -> Any:
    processor = make_processor()
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_dropout": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    targets = {"r": 4, "target_modules": LORA_TARGETS, "init_lora_weights": False}
    model = make_model(processor, freeze)
    if changes.get("beta") and not lora:
        # The reference is loaded anew from where the model came from.
        model.save_pretrained(folder)
        model = load_qwen(folder)
        if freeze:
            freeze_vision(model)
    trainer = kind(
        model=model,
        reward_funcs=even_tokens,
        args=GroupConfig(**{**options, **changes}),
        train_dataset=make_rows(),
        processing_class=processor,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **targets) if lora else None,
    )
    trainer.silent = silent
    return trainer


def train(kind: type, folder: str, **changes: Any) -> list[dict[str, float]]:
    """Logs of a short run."""
    torch.manual_seed(1)
    trainer = make_trainer(kind, folder, **changes)
    trainer.train()
    return [row for row in trainer.state.log_history if "grad_norm" in row]


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as out:
        logs = {kind.__name__: train(kind, out, **settings) for kind in (Stock, Ours)}
    if torch.distributed.get_rank() == 0:
        print("LOGS " + json.dumps(logs))
