"""GRPO steps of TRL's GRPOTrainer and of ours: same model, prompts and completions, one process tree.

    python benchmarks/shared_prefix.py
    python benchmarks/shared_prefix.py --preset 3b --completion-tokens 128        # on a GPU
    python benchmarks/shared_prefix.py --preset 7b --completion-tokens 128 --lora

Each trainer runs in a process of its own, so that peak memory is its own. In its first step both get the same made-up
completions and a learning rate of 0: their log-probabilities and gradients are compared (`max_logp_diff`,
`max_grad_rel_diff`, the largest relative error among the tensors). The steps after it generate, of full length, and
are timed: `train_step_ratio` is forward and backward, `generate_ratio` the rollouts, `step_ratio` a whole step of
`train()` with image processing, rewards and optimizer, `memory_ratio` peak memory (resident set on a CPU, allocated on
a GPU). Ratios are TRL over ours, medians over the steps; `*_flops_ratio` is what the formula of methods 9.2 gives.

A frozen vision tower reads an image once in a run. The ratios are of steps whose images the run has seen before, as in
every epoch but the first; those under `first_sight` are of steps with new images. TRL's steps cost the same in both.

Both read images by the same processor (PIL), see the frozen vision tower of a randomly made Qwen2.5-VL, and write
sampled tokens by `generate` of transformers. `others_busy` is the fraction of the cores' time that other processes
took: above a few per cent the ratios are not to be trusted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.measure import Others, Peak, give, run_worker, settle, versions
from benchmarks.shapes import PRESETS, flops, shape

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOPs a second, by name of the GPU."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or `argv` in its place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt (G)")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--image-tokens", type=int, default=1024, help="a square number")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--hidden", type=int, default=512, help="width of language model and vision tower (small)")
    parser.add_argument("--layers", type=int, default=8, help="depth of both (small)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--attention", choices=["sdpa", "flex_attention"], default="sdpa", help="of ours")
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL term")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each trainer")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that the benchmark may use")
    parser.add_argument("--worker", choices=["stock", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """Model with random weights and its processor."""
    import torch
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from frugalpath.models.qwen_vl import SPECIAL, QwenProcessor, freeze_vision, small_qwen
    from frugalpath.models.tokenizer import train_tokenizer

    torch.manual_seed(0)
    size, made = {"shortest_edge": 784, "longest_edge": 784 * options.image_tokens}, shape(options)
    tokenizer = train_tokenizer(["Which grade has this tumour?"], 400, SPECIAL)
    processor = QwenProcessor(Qwen2VLImageProcessorPil(size=size), tokenizer)
    text = {
        "hidden_size": made["hidden"],
        "intermediate_size": made["ffn"],
        "num_hidden_layers": made["layers"],
        "num_attention_heads": made["heads"],
        "num_key_value_heads": made["kv_heads"],
        "vocab_size": made["vocab"] or len(tokenizer),
        "tie_word_embeddings": made["tied"],
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    dtype, before = getattr(torch, options.dtype), torch.get_default_dtype()
    try:
        if options.preset != "small":
            # In float32 first a published shape would take twice the memory that training it does.
            torch.set_default_dtype(dtype)
        with torch.device(options.device):
            model = small_qwen(tokenizer, text, made["tower"])
    finally:
        torch.set_default_dtype(before)
    freeze_vision(model)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # and no buffers: frequencies of rotations stay float32, as when loaded
    return model, processor


def prompts(options: argparse.Namespace, processor: Any, count: int) -> Any:
    """Training set: noise of the asked number of tokens, and a question that brings the text to its length."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    side = round(options.image_tokens**0.5) * 28
    if (side // 28) ** 2 != options.image_tokens:
        raise SystemExit(f"--image-tokens {options.image_tokens}: take a square number, such as {(side // 28) ** 2}")

    def text_tokens(words: int) -> int:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a" * words}]}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        return len(processor.tokenizer(text)["input_ids"]) - 1

    # The template takes some of them.
    words = options.text_tokens - text_tokens(0)
    while text_tokens(words) > options.text_tokens:
        words -= 1
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": " a" * words}], "image": i} for i in images])


def trainer_of(options: argparse.Namespace) -> type:
    """The trainer with clocks on its parts; its first step takes made-up completions."""
    import torch
    from trl import GRPOTrainer

    from frugalpath.rl.trainer import GroupTrainer

    base: Any = GroupTrainer if options.worker == "ours" else GRPOTrainer

    class Timed(base):
        """Seconds of each call, by part."""

        def clock(self, part: str, call: Callable[[], Any]) -> Any:
            if options.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            out = call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            self.times.setdefault(part, []).append(time.perf_counter() - start)
            return out

        def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> Any:
            if self.state.global_step:
                return self.clock("generate", lambda: super(Timed, self)._generate_single_turn(prompt_ids, *rest))
            draw = torch.Generator().manual_seed(0)
            shape = (len(prompt_ids), options.completion_tokens)
            return torch.randint(10, 250, shape, generator=draw).tolist(), None

        def _generate_and_score_completions(self, inputs: list) -> Any:
            return self.clock("rollouts", lambda: super(Timed, self)._generate_and_score_completions(inputs))

        def training_step(self, *args: Any) -> Any:
            return self.clock("micro_step", lambda: super(Timed, self).training_step(*args))

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if self.state.global_step == 0 and torch.is_grad_enabled():
                # TRL shuffles the rows of a batch, ours its groups.
                written = args[1][:, -options.completion_tokens :].tolist()
                order = sorted(range(len(written)), key=written.__getitem__)
                self.first_logps = out[0].detach().float().cpu()[order]
            return out

    Timed.times = {}
    return Timed


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Train with one trainer; its times, memory and, in a file, log-probabilities and gradients of the first step."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from frugalpath.models.build import LORA_TARGETS
    from frugalpath.models.qwen_vl import freeze_vision, load_qwen
    from frugalpath.recipe.grpo import GroupConfig

    torch.set_num_threads(options.cores)
    model, processor = build(options)
    steps = 1 + options.steps
    folder = Path(options.folder)
    if options.beta and not options.lora:
        # The reference is loaded anew from where the model came from.
        model.save_pretrained(folder / "start")
        model = load_qwen(folder / "start", dtype=model.dtype, device_map=options.device)
        freeze_vision(model)
    rows = prompts(options, processor, options.prompts * steps)
    cuda = options.device == "cuda"
    config = GroupConfig(
        output_dir=str(folder / options.worker),
        per_device_train_batch_size=options.group * options.prompts,
        num_generations=options.group,
        max_completion_length=options.completion_tokens,
        generation_kwargs={"min_new_tokens": options.completion_tokens},
        max_steps=steps if options.worker == "stock" else 2 * steps,
        shuffle_dataset=False,  # the second half of our steps goes over the images of the first again
        learning_rate=0.0,
        beta=options.beta,
        flex_attention=options.attention == "flex_attention",  # TRL's own trainer does not know it
        bf16=options.dtype == "bfloat16",
        use_cpu=not cuda,
        gradient_checkpointing=options.checkpointing,
        disable_dropout=True,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = trainer_of(options)(
        model=model,
        reward_funcs=lambda completion_ids, **_: [sum(ids) % 97 / 97 for ids in completion_ids],
        args=config,
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
        if options.lora
        else None,
    )
    starts: list[float] = []
    kept = folder / f"{options.worker}-first"
    kept.mkdir()

    def keep(name: str, values: torch.Tensor) -> int:
        """Write a tensor to a file of its own, so that keeping them takes no memory; returns its bytes."""
        save_file({"values": values.detach().float().cpu().contiguous()}, kept / f"{name}.safetensors")
        return 4 * values.numel()

    class Watch(TrainerCallback):
        """Keeps the gradients of the first step and the time at which each step ends."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                size = 0
                keep("logps", trainer.first_logps)
                for name, parameter in trainer.model.named_parameters():
                    if parameter.grad is not None and size < 5e8:
                        size += keep(name, parameter.grad)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            starts.append(time.perf_counter())

    trainer.add_callback(Watch())
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # of training, not of making the model
    trainer.train()
    parts = {k: v[-len(starts) :] for k, v in trainer.times.items()}
    parts["train_step"] = [a - b for a, b in zip(parts["micro_step"], parts["rollouts"], strict=True)]
    parts["step"] = [0.0, *(after - before for before, after in itertools.pairwise(starts))]
    parts["generate"] = [0.0, *parts["generate"]][-len(starts) :]
    first = {k: parts[k][1:steps] for k in ("train_step", "generate", "step")}
    last = {k: parts[k][-options.steps :] for k in first}
    return {
        **last,
        "first_sight": first,
        "peak_gb": Peak(options.device).read() / 1e9,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
    }


def compare(stock_first: Path, own_first: Path) -> dict[str, float]:
    """Differences of the first step's log-probabilities and gradients, from the folders that `work` kept them in."""
    from safetensors.torch import load_file

    stock, own = ({p.stem: load_file(p)["values"] for p in f.iterdir()} for f in (stock_first, own_first))
    logps = (stock.pop("logps") - own.pop("logps")).abs()
    if stock.keys() != own.keys():
        raise RuntimeError(f"gradients of different tensors: {sorted(stock.keys() ^ own.keys())}")
    largest = max(g.norm().item() for g in stock.values())
    # A tensor without any effect, such as the bias of keys, has a gradient of rounding only.
    errors = [
        (own[k] - g).norm().item() / max(g.norm().item(), 1e-4 * largest) for k, g in stock.items() if g.norm() > 0
    ]
    return {
        "max_logp_diff": logps.max().item(),
        "mean_logp_diff": logps.mean().item(),
        "max_grad_rel_diff": max(errors),
    }


def main() -> None:
    """Run both trainers and print one JSON line."""
    import torch
    import transformers
    import trl

    options = parse()
    settle(options)
    if options.checkpointing is None:
        options.checkpointing = options.device == "cuda"
    if options.worker:
        give(work(options))
        return
    found: dict[str, dict[str, Any]] = {}
    others = Others()
    with tempfile.TemporaryDirectory() as folder:
        for worker in ("stock", "ours"):
            arguments = [*sys.argv[1:], "--worker", worker, "--folder", folder]
            found[worker] = run_worker(__file__, arguments, f"the {worker} trainer")
        equality = compare(Path(folder, "stock-first"), Path(folder, "ours-first"))
    others_busy = others.busy()
    result: dict[str, Any] = {}
    formula = {name: flops(options, name == "ours") for name in found}
    for part in ("train_step", "generate", "step"):
        middle = {name: statistics.median(found[name][part]) for name in found}
        result[f"{part}_ratio"] = round(middle["stock"] / middle["ours"], 2)
        result[f"{part}_seconds"] = {name: [round(s, 3) for s in found[name][part]] for name in found}
        result[f"{part}_flops_ratio"] = round(formula["stock"][part] / formula["ours"][part], 2)
    for part in ("generate", "step"):
        new = statistics.median(found["ours"]["first_sight"][part])
        result.setdefault("first_sight", {})[f"{part}_ratio"] = round(statistics.median(found["stock"][part]) / new, 2)
    result["first_sight"]["seconds"] = {
        part: [round(s, 3) for s in found["ours"]["first_sight"][part]] for part in ("generate", "step")
    }
    result["memory_ratio"] = round(found["stock"]["peak_gb"] / found["ours"]["peak_gb"], 2)
    result["peak_gb"] = {name: round(found[name]["peak_gb"], 2) for name in found}
    device = found["ours"]["device"]
    peak = next((v for k, v in PEAK_FLOPS.items() if k in device), None)
    if peak:
        result["train_step_mfu"] = {
            name: round(options.prompts * formula[name]["train_step"] / middle[name] / peak, 3) for name in found
        }
    settings = {k: v for k, v in vars(options).items() if k not in ("worker", "folder")}
    result |= {
        **equality,
        "n": options.steps,
        "statistic": "median of steps",
        "others_busy": others_busy,
        "device_name": device,
        "options": settings,
        "versions": versions(torch, transformers, trl),
        "command": " ".join(["python", "benchmarks/shared_prefix.py", *sys.argv[1:]]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
