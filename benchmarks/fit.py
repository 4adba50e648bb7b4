"""The memory that `frugalpath.doctor` expects against what training takes: a few shapes, each in a process of its own.

    python benchmarks/fit.py
    python benchmarks/fit.py --only grpo grpo_lora

Prints one JSON line for each shape and phase: GB expected and measured beside the libraries, and their ratio. On a CPU
it is the resident memory over that before the model was made; freed memory goes back to the system at once
(MALLOC_MMAP_THRESHOLD_), so that the allocator's holes are not counted. On a GPU it is what torch allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import Others, Peak, give, machine, run_worker, settle, versions

MODEL = {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocab_size": 8192}
SFT = {"kind": "sft", "rows": 4, "visual": 64, "text": 64, "written": 128}
GRPO = {"kind": "grpo", "prompts": 2, "group": 4, "visual": 256, "text": 64, "written": 48}
SHAPES: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "sft_checkpointing": {**SFT, "rows": 8, "checkpointing": True},
    "sft_lora": {**SFT, "lora": {"r": 16}},
    "sft_bf16": {**SFT, "bf16": True},
    "sft_wide": {**SFT, "rows": 2, "model": {**MODEL, "hidden": 1024, "layers": 4, "ffn": 3072}},
    "grpo": GRPO,
    "grpo_checkpointing": {**GRPO, "checkpointing": True},
    "grpo_lora": {**GRPO, "lora": {"r": 16}},
    "grpo_accumulated": {**GRPO, "accumulation": 2},
    "grpo_unshared": {**GRPO, "prompts": 1, "shared": False},
}
"""Of the model 8 layers of width 512 unless a shape names another."""
STEPS = 2


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="shapes to run")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that the benchmark may use")
    parser.add_argument("--worker", choices=list(SHAPES), help=argparse.SUPPRESS)
    return parser.parse_args()


def subject_of(shape: dict[str, Any]) -> Any:
    """The model of a shape."""
    from frugalpath.doctor.subject import Subject
    from frugalpath.models.build import PerformerConfig

    family = "slide_vlm" if shape["kind"] == "sft" else "qwen_vl"
    return Subject.of(PerformerConfig(family=family, lora=shape.get("lora"), **shape.get("model", MODEL)), 1280)


def jobs(shape: dict[str, Any]) -> dict[str, Any]:
    """The work of a shape, by phase."""
    from frugalpath.doctor.jobs import Job
    from frugalpath.doctor.tracing import Observations, Update, Writing

    lora, visual, written = shape.get("lora"), shape["visual"], shape["written"]
    seen, prompt = Observations(visual, visual), shape["text"] + visual
    shared: dict[str, Any] = {
        "seen": seen,
        "checkpointing": shape.get("checkpointing", False),
        "bf16": shape.get("bf16", False),
        "accumulates": shape.get("accumulation", 1) > 1,
        "lora": lora,
    }
    more: dict[str, Any] = {"per_step": 1, "trains": (lora, None), "optimizer": "adamw_torch_fused"}
    if shape["kind"] == "sft":
        rows = shape["rows"]
        update = Update(rows, prompt + written, rows * written, 0, supervised=True, **shared)
        return {"sft": Job("sft", update, **more)}
    count, group = shape["prompts"], shape["group"]
    if shape.get("shared", True):
        size = {"rows": count, "length": prompt - 1 + group * (written + 1), "prefix": prompt - 1}
    else:
        size = {"rows": count * group, "length": prompt + written, "prefix": 0}
    update = Update(scored=count * group * written, **size, **shared)
    copies = count * shape.get("accumulation", 1)
    writing = Writing(copies, group, prompt, written, seen, shape.get("bf16", False), True, lora)
    return {"generation": Job("generation", writing, **more), "grpo": Job("grpo", update, **more)}


def real(shape: dict[str, Any], device: str) -> Any:
    """The model with random weights."""
    import torch

    subject = subject_of(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = subject.build()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    return model


def train_sft(shape: dict[str, Any], model: Any, folder: str, note: Callable[..., None], device: str) -> Any:
    """A few steps of supervised training on rows of noise."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model

    from frugalpath.models.build import PerformerConfig, lora_config
    from frugalpath.models.processor import SlideProcessor
    from frugalpath.models.tokenizer import train_tokenizer
    from frugalpath.sft.supervised import StageTrainer, sft_config

    class Noted(StageTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            note(None)
            out = super().training_step(*args, **kwargs)
            note("sft", self.state.global_step)
            return out

    visual, text, written = shape["visual"], shape["text"], shape["written"]
    length, width = visual + text + written, model.config.feature_dim + 4

    def batch(rows: list) -> dict[str, torch.Tensor]:
        ids = torch.randint(10, 200, (len(rows), length))
        ids[:, :visual] = model.config.image_token_id
        labels = ids.clone()
        labels[:, : visual + text] = -100
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # rows differ in length, so that they need a mask
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels.masked_fill(mask == 0, -100),
            "position_ids": torch.arange(length).expand(len(rows), -1),
            "pixel_values": torch.rand(len(rows) * visual, width),
        }

    own = PerformerConfig(lora=shape.get("lora"))
    adapters = lora_config(own, model)
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": shape["rows"],
        "gradient_checkpointing": shape.get("checkpointing", False),
        "bf16": shape.get("bf16", False),
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    tokenizer = train_tokenizer(["a question"], 400)
    return Noted(
        model=model if adapters is None else get_peft_model(model, adapters),
        args=sft_config(folder, options, 0),
        data_collator=batch,
        train_dataset=Dataset.from_dict({"index": list(range(shape["rows"] * STEPS))}),
        processing_class=SlideProcessor(tokenizer),
    )


def train_grpo(shape: dict[str, Any], model: Any, folder: str, note: Callable[..., None], device: str) -> Any:
    """A few steps of GRPO on images of noise."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from frugalpath.models.build import PerformerConfig, lora_config
    from frugalpath.models.qwen_vl import SPECIAL, QwenProcessor
    from frugalpath.models.tokenizer import train_tokenizer
    from frugalpath.recipe.grpo import GroupConfig
    from frugalpath.rl.trainer import GroupTrainer

    class Noted(GroupTrainer):
        def _generate_single_turn(self, *args: Any) -> Any:
            note(None)
            out = super()._generate_single_turn(*args)
            note("generation", self.state.global_step)
            return out

        def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            note(None)
            return super()._compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            out = super().training_step(*args, **kwargs)
            note("grpo", self.state.global_step)
            return out

    visual, group, accumulation = shape["visual"], shape["group"], shape.get("accumulation", 1)
    side = round(visual**0.5) * 28
    size = {"shortest_edge": 784, "longest_edge": 784 * visual}
    tokenizer = train_tokenizer(["a question"], 400, SPECIAL)
    processor = QwenProcessor(Qwen2VLImageProcessorPil(size=size), tokenizer)
    rng = np.random.default_rng(0)
    count = shape["prompts"] * STEPS * accumulation
    images = [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    empty = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    rest = len(tokenizer(processor.apply_chat_template(empty, add_generation_prompt=True))["input_ids"])
    words = "a" * (shape["text"] - rest)  # a token each, as the tokenizer knows no longer ones of them
    assert len(tokenizer(words)["input_ids"]) == shape["text"] - rest
    args = GroupConfig(
        output_dir=folder,
        per_device_train_batch_size=shape["prompts"] * group,
        gradient_accumulation_steps=accumulation,
        num_generations=group,
        max_completion_length=shape["written"],
        generation_kwargs={"min_new_tokens": shape["written"]},
        max_steps=STEPS,
        shared_prefix=shape.get("shared", True),
        gradient_checkpointing=shape.get("checkpointing", False),
        bf16=shape.get("bf16", False),
        use_cpu=device == "cpu",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    return Noted(
        model=model,
        reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": words}], "image": image} for image in images]
        ),
        processing_class=processor,
        peft_config=lora_config(PerformerConfig(family="qwen_vl", lora=shape.get("lora")), model),
    )


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Train a shape; peak memory of each phase over that before the model, in the last step."""
    import torch

    # All that a run imports is there before the first measurement, and what training imports late as well.
    import frugalpath.rl.pipeline  # noqa: F401

    torch.set_num_threads(options.cores)
    shape, device = SHAPES[options.worker], options.device
    peak = Peak(device)
    found: dict[str, float] = {}
    warm = {**shape, "model": {**MODEL, "layers": 1, "hidden": 64, "ffn": 64, "vocab_size": 512}}
    train = train_sft if shape["kind"] == "sft" else train_grpo
    with tempfile.TemporaryDirectory() as folder:
        train(warm, real(warm, device), folder, lambda *_: None, device).train()
        before = peak.reset()

        def note(phase: str | None, step: int = -1) -> None:
            if phase is None:
                peak.reset()
            elif step == STEPS - 1:  # optimizer states are there
                found[phase] = max(found.get(phase, 0.0), peak.read() - before)

        train(shape, real(shape, device), folder, note, device).train()
    return found


def main() -> None:
    """Run the shapes, each in a worker, and print a JSON line for each phase."""
    import torch
    import transformers
    import trl

    options = parse()
    settle(options)
    if options.worker:
        give(work(options))
        return
    from frugalpath.doctor.fit import Place, phase_of

    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for name in options.only:
        others = Others()
        arguments = ["--worker", name, "--device", options.device, "--cores", str(options.cores)]
        measured = run_worker(__file__, arguments, name)
        subject, gpu = subject_of(SHAPES[name]), options.device == "cuda"
        for phase, job in jobs(SHAPES[name]).items():
            expected = phase_of(subject, job, Place(gpu))
            print(
                json.dumps(
                    {
                        "shape": name,
                        "phase": phase,
                        "estimate_gb": round(expected.peak / 1e9, 3),
                        "measured_gb": round(measured[phase] / 1e9, 3),
                        "ratio": round(expected.peak / measured[phase], 3),
                        "at": expected.moment,
                        "parts_gb": {k: round(v / 1e9, 3) for k, v in expected.parts.items()},
                        "others_busy": others.busy(),
                        "machine": machine(options.device),
                        "versions": versions(torch, transformers, trl),
                        "command": " ".join(["python", "benchmarks/fit.py", *sys.argv[1:]]),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
