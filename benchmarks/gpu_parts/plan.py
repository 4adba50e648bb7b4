"""The parts of `gpu.py`, most valuable first, with the seconds that each takes on an H100, and in small on a CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--hidden", "64", "--layers", "1", "--image-tokens", "4", "--text-tokens", "24", "--completion-tokens", "3",
         "--group", "2", "--steps", "1"]  # fmt: skip
"""A model of `shared_prefix.py` that says nothing about speed."""


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Args:
        name: of its lines. group: letter by which several are asked for. module: of this folder; its `run` is called.
        seconds: expected on an H100; it is not begun with less left. limit: seconds after which it is ended.
        settings: what `run` is told. small: what it is told in a rehearsal.
        modules: packages that it needs. file: of the repository that it needs. gpu: it cannot be rehearsed.
    """

    name: str
    group: str
    module: str
    seconds: float
    limit: float
    settings: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    file: str | None = None
    gpu: bool = False

    def missing(self, rehearse: bool) -> str | None:
        """What it lacks on this machine; None where nothing."""
        lacking = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if lacking:
            return f"not installed: {', '.join(lacking)}"
        if self.file and not (ROOT / self.file).is_file():
            return f"not installed: {self.file}"
        return "needs a GPU" if self.gpu and rehearse else None


def step(preset: str, image_tokens: int, trainer: str, seconds: float, limit: float, attention: str = "sdpa") -> Part:
    """Steps of one trainer on a published shape with LoRA."""
    flex = attention == "flex_attention"
    shape = ["--preset", preset, "--image-tokens", str(image_tokens), "--completion-tokens", "128", "--lora"]
    told = {"trainer": trainer, "shape": preset, "folder": f"{preset}-{image_tokens}-{attention}"}
    return Part(
        f"{preset}_{image_tokens}_{trainer}{'_flex' if flex else ''}",
        "c" if preset == "3b" else "d",
        "steps",
        seconds,
        limit,
        {**told, "options": [*shape, "--attention", attention]},
        {**told, "options": [*SMALL, "--lora"]},
        gpu=flex,
    )


def script(name: str, group: str, seconds: float, limit: float, file: str, options: list[str]) -> Part:
    """A benchmark of its own, which prints JSON lines. It has sizes for a CPU of its own, so it is not rehearsed."""
    return Part(name, group, "scripts", seconds, limit, {"script": file, "options": options}, file=file, gpu=True)


EXACT = ["--image-tokens", "256", "--text-tokens", "64", "--completion-tokens", "64", "--no-checkpointing"]
BF16 = ["--settings", "large", "--seeds", "2", "--cores", "16"]
PARTS = [
    Part("environment", "a", "environment", 10, 60, {"size": 8192, "seconds": 1.0}, {"size": 256, "seconds": 0.05}),
    Part("exactness", "b", "exactness", 20, 75, {"attention": "sdpa", "options": EXACT},
         {"attention": "sdpa", "options": SMALL}),
    step("3b", 256, "ours", 45, 90),
    step("3b", 256, "stock", 25, 75),
    step("3b", 1024, "ours", 45, 90),
    step("3b", 1024, "stock", 35, 90),
    Part("encoding", "f", "encoding", 20, 50, {"vit": "large", "tiles": 512}, {"vit": "tiny", "tiles": 2}),
    Part("recipe", "g", "recipe", 70, 150, {"preset": "3b"}, {"preset": "small"}),
    step("7b", 1024, "ours", 45, 90),
    step("7b", 1024, "stock", 35, 90),
    Part("estimate", "e", "estimate", 20, 60),
    Part("exactness_flex", "b", "exactness", 40, 100, {"attention": "flex_attention", "options": EXACT}, gpu=True),
    script("bf16", "b", 50, 110, "benchmarks/bf16.py", BF16),
    Part("fsdp2", "h", "launches", 45, 100, {"config": "fsdp2"}, {"config": "fsdp2"}),
    Part("zero3", "h", "launches", 30, 80, {"config": "zero3"}, {"config": "zero3"}, ("deepspeed",)),
    Part("vllm", "h", "rollouts", 60, 120, modules=("vllm", "pytest")),
    step("3b", 1024, "ours", 45, 90, "flex_attention"),
    step("7b", 256, "ours", 45, 90),
    step("7b", 256, "stock", 30, 75),
    script("fit", "e", 35, 75, "benchmarks/fit.py", ["--only", "grpo_lora", "sft_bf16"]),
    script("bf16_flex", "b", 60, 140, "benchmarks/bf16.py", [*BF16, "--attention", "flex"]),
]  # fmt: skip


def chosen(names: str | None) -> list[Part]:
    """The parts asked for by letters or names, separated by commas; all by default.

    Raises:
        SystemExit: a name that is none.
    """
    if not names:
        return PARTS
    asked = [name.strip() for name in names.split(",")]
    known = {word for part in PARTS for word in (part.name, part.group)}
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"--parts: no part {', '.join(unknown)}; there are {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if part.name in asked or part.group in asked]
