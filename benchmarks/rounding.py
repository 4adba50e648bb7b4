"""Log-probabilities and gradients of TRL's GRPOTrainer and of ours, on weights and rollouts that a seed makes up."""

from __future__ import annotations

import argparse
import math
import tempfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from benchmarks.shapes import shape
from benchmarks.shared_prefix import build
from frugalpath.models.build import LORA_TARGETS
from frugalpath.models.tokenizer import train_tokenizer
from frugalpath.recipe.grpo import GroupConfig
from frugalpath.rl.trainer import GroupTrainer

TRAINERS = {"stock": GRPOTrainer, "ours": GroupTrainer}
WAYS = {
    "float32": (torch.float32, False),
    "autocast": (torch.float32, True),
    "weights": (torch.bfloat16, True),
}
"""dtype of the weights, and `bf16` of the trainer's arguments."""


@dataclass(frozen=True)
class Setting:
    """A model and what it reads in a step.

    Args:
        family: "llama", "qwen2" or "qwen2_5_vl". hidden, layers: of the language model, and of the vision tower.
        image: tokens of a prompt's image, a square number. text: tokens of a prompt's text, about.
        group: completions of a prompt. written: tokens of the longest; the shortest has half of them.
        prompts: of a step; one has half the text of the one before.
        sharp: what attention scores, about 1 otherwise, are multiplied by.
    """

    family: str
    hidden: int
    layers: int
    image: int
    text: int
    group: int
    written: int
    prompts: int = 1
    lora: bool = False
    sharp: float = 1.0

    def __post_init__(self) -> None:
        if math.isqrt(self.image) ** 2 != self.image:
            raise ValueError(f"an image of {self.image} tokens; take a square number")

    @property
    def name(self) -> str:
        """What the table calls it."""
        prompt = f"{self.image}+{self.text}" if self.image else str(self.text)
        more = f" x{self.prompts}" * (self.prompts > 1) + " lora" * self.lora
        more += f" sharp {self.sharp:g}" * (self.sharp != 1.0)
        return f"{self.family} {self.hidden}x{self.layers} prompt {prompt} G {self.group} C {self.written}{more}"


SETTINGS = {
    "small": [
        Setting("llama", 64, 2, image=0, text=32, group=4, written=16),
        Setting("llama", 512, 2, image=0, text=32, group=4, written=8),
        Setting("qwen2", 64, 8, image=0, text=48, group=4, written=32),
        Setting("qwen2", 128, 4, image=0, text=96, group=8, written=16),
        Setting("qwen2", 128, 2, image=0, text=64, group=8, written=32, lora=True),
        Setting("qwen2_5_vl", 64, 2, image=16, text=24, group=8, written=16, prompts=2),
        Setting("qwen2_5_vl", 128, 2, image=64, text=24, group=4, written=32, lora=True),
        Setting("qwen2_5_vl", 256, 2, image=64, text=32, group=4, written=16),
        Setting("qwen2_5_vl", 128, 2, image=256, text=24, group=4, written=16),
        Setting("qwen2_5_vl", 64, 2, image=1024, text=24, group=4, written=16),
    ],
    "sharp": [
        Setting("llama", 64, 2, image=0, text=64, group=8, written=16, sharp=4.0),
        Setting("qwen2", 128, 2, image=0, text=96, group=8, written=16, sharp=4.0),
        Setting("qwen2_5_vl", 64, 2, image=64, text=24, group=8, written=16, sharp=4.0),
        Setting("qwen2_5_vl", 64, 4, image=16, text=24, group=4, written=16, lora=True, sharp=4.0),
    ],
    "large": [
        Setting("llama", 512, 8, image=0, text=256, group=8, written=128),
        Setting("qwen2", 1024, 8, image=0, text=512, group=8, written=64, prompts=2),
        Setting("qwen2_5_vl", 512, 8, image=1024, text=64, group=8, written=64),
        Setting("qwen2_5_vl", 512, 8, image=256, text=64, group=16, written=128, lora=True),
        Setting("qwen2_5_vl", 1024, 8, image=1024, text=64, group=4, written=64, prompts=2),
    ],
}


@dataclass(frozen=True)
class Outcome:
    """Of one step: log-probabilities (tokens,) of the completions in the order of their ids, and all gradients."""

    logps: torch.Tensor
    gradients: dict[str, torch.Tensor]


def make_model(setting: Setting, device: str) -> tuple[Any, Any]:
    """The model in float32, and its processor or tokenizer."""
    asked = argparse.Namespace(
        preset="small",
        hidden=setting.hidden,
        layers=setting.layers,
        image_tokens=max(1, setting.image),
        attention="sdpa",
        worker="stock",
        device=device,
        dtype="float32",
    )
    if setting.family == "qwen2_5_vl":
        return build(asked)
    made, tokenizer = shape(asked), train_tokenizer(["Which grade has this tumour?"], 400)
    config = AutoConfig.for_model(
        setting.family,
        hidden_size=made["hidden"],
        intermediate_size=made["ffn"],
        num_hidden_layers=made["layers"],
        num_attention_heads=made["heads"],
        num_key_value_heads=made["kv_heads"],
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device), tokenizer


@torch.no_grad()
def draw_weights(model: Any, seed: int, sharp: float = 1.0) -> None:
    """Weights that keep activations and scores near 1, each a number of bfloat16, so that only the work is rounded.

    Args:
        sharp: what attention scores of the language model are multiplied by.
    """
    for name, weight in model.named_parameters():
        draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        values = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 1:
            values = 0.1 * values + (not name.endswith("bias"))
        elif "embed_tokens" not in name:
            values *= (0.1 if "lora_B" in name else 1.0) * weight[0].numel() ** -0.5
        if "q_proj" in name and "lora_A" not in name:
            values *= sharp
        weight.copy_(values.bfloat16())


def make_rows(setting: Setting, first: int, count: int) -> Dataset:
    """Prompts of `count` steps: letters at random, and noise as the image."""
    rows = []
    side = 28 * math.isqrt(setting.image)
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        for i in range(setting.prompts):
            content = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz "), setting.text >> i))
            row: dict[str, Any] = {"prompt": [{"role": "user", "content": content}]}
            if side:
                row["image"] = Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
            rows.append(row)
    return Dataset.from_list(rows)


def recorder(base: Any, setting: Setting, first: int) -> Any:
    """A trainer whose completions are made up, and which keeps the log-probabilities of its last update."""

    class Recorder(base):
        last_logps: torch.Tensor

        def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> tuple[list, None]:
            rng = np.random.default_rng([first + self.state.global_step, 1])
            lengths = rng.integers((setting.written + 1) // 2, setting.written + 1, len(prompt_ids))
            return [rng.integers(10, 250, n).tolist() for n in lengths], None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if torch.is_grad_enabled():
                _, ids, mask, width = args[:4]
                rows = zip(ids[:, -width:], mask[:, -width:].bool(), out[0].detach().float().cpu(), strict=True)
                # TRL shuffles the rows of a batch, ours its groups.
                found = {tuple(i[m].tolist()): logps[m.cpu()] for i, m, logps in rows}
                self.last_logps = torch.cat([found[k] for k in sorted(found)])
            return out

    return Recorder


def outcomes(
    setting: Setting, trainer: str, way: str, first: int, count: int, device: str, flex: bool, on_step: Any
) -> None:
    """Run `count` steps of a trainer without learning; hands each one's number from 0 and `Outcome` to `on_step`."""
    dtype, bf16 = WAYS[way]
    model, processor = make_model(setting, device)

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            draw_weights(made.model, first + state.global_step, setting.sharp)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = {
                n: p.grad.detach().float().cpu().clone()
                for n, p in made.model.named_parameters()
                if p.grad is not None
            }
            on_step(state.global_step, Outcome(made.last_logps, gradients))

    targets = LORA_TARGETS if setting.family == "qwen2_5_vl" else "all-linear"
    with tempfile.TemporaryDirectory() as folder:
        config = GroupConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.group * setting.prompts,
            num_generations=setting.group,
            max_completion_length=setting.written,
            max_steps=count,
            shuffle_dataset=False,
            learning_rate=0.0,
            max_grad_norm=0.0,  # a clipped gradient would have the norm's error too
            bf16=bf16,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            flex_attention=flex,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        made = recorder(TRAINERS[trainer], setting, first)(
            model=model.to(dtype),
            reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
            args=config,
            train_dataset=make_rows(setting, first, count),
            processing_class=processor,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
            if setting.lora
            else None,
        )
        made.remove_callback(PrinterCallback)  # prints a summary
        made.add_callback(Watch())
        made.train()


def errors(found: Outcome, truth: Outcome) -> dict[str, float]:
    """How far a step is from the truth: RMS of the log-probabilities, relative L2 of the gradients.

    Returns:
        `logp`; `grad`, over all tensors as one vector; `median` and `max`, over the single tensors.

    Raises:
        RuntimeError: they have gradients of different tensors, or completions of different lengths.
    """
    if found.logps.shape != truth.logps.shape:
        raise RuntimeError(f"completions of {len(found.logps)} tokens and {len(truth.logps)}")
    if found.gradients.keys() != truth.gradients.keys():
        raise RuntimeError(
            f"gradients of different tensors: {sorted(found.gradients.keys() ^ truth.gradients.keys())}"
        )
    sizes = {k: g.double().norm().item() for k, g in truth.gradients.items()}
    whole = sum(s**2 for s in sizes.values()) ** 0.5
    off = {k: (found.gradients[k].double() - g.double()).norm().item() for k, g in truth.gradients.items()}
    # A tensor without any effect, such as the bias of keys, has a gradient of rounding only.
    single = [off[k] / s for k, s in sizes.items() if s > 1e-4 * whole]
    return {
        "logp": (found.logps.double() - truth.logps.double()).square().mean().sqrt().item(),
        "grad": sum(o**2 for o in off.values()) ** 0.5 / whole,
        "median": float(np.median(single)),
        "max": max(single),
    }
