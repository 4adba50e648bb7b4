"""The memory that `frugalpath.doctor` expects of the steps that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.fit import MODEL, jobs
from benchmarks.gpu_parts.task import Task
from frugalpath.doctor.fit import Place, phase_of
from frugalpath.doctor.subject import Subject
from frugalpath.models.build import PerformerConfig

IMPORTS = ("frugalpath.rl.pipeline",)
PUBLISHED = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}


def run(task: Task) -> Iterator[dict[str, Any]]:
    """A line for each shape that our trainer has run."""
    measured = [
        line
        for lines in task.earlier.values()
        for line in lines
        if line.get("case") == "steps" and line["trainer"] == "ours" and line["attention"] == "sdpa"
    ]
    if not measured:
        raise RuntimeError("no steps of ours were measured before: run the parts c or d with it")
    for line in measured:
        options = line["options"]
        lora = {"r": 16} if options["lora"] else None
        shape = {
            "kind": "grpo", "prompts": options["prompts"], "group": options["group"], "visual": line["image_tokens"],
            "text": options["text_tokens"], "written": options["completion_tokens"], "lora": lora,
            "checkpointing": options["checkpointing"], "bf16": options["dtype"] == "bfloat16",
        }  # fmt: skip
        source: dict[str, Any] = {"pretrained": PUBLISHED.get(options["preset"])}
        if options["preset"] == "small":  # of a rehearsal: the estimate runs, its ratio says nothing
            source = {**MODEL, "hidden": 64, "layers": 1, "heads": 1, "kv_heads": 1, "ffn": 192, "vocab_size": 400}
        subject = Subject.of(PerformerConfig(family="qwen_vl", lora=lora, **source), 1280)
        phases = {name: phase_of(subject, job, Place(task.device == "cuda")) for name, job in jobs(shape).items()}
        name, highest = max(phases.items(), key=lambda item: item[1].peak)
        yield {
            "case": f"{line['shape']} {line['image_tokens']}",
            "shape": line["shape"],
            "image_tokens": line["image_tokens"],
            "phase": name,
            "estimate_gb": round(highest.peak / 1e9, 3),
            "measured_gb": line["peak_gb"],
            "ratio": round(highest.peak / 1e9 / line["peak_gb"], 3),
            "phases_gb": {name: round(phase.peak / 1e9, 3) for name, phase in phases.items()},
            "parts_gb": {part: round(value / 1e9, 3) for part, value in highest.parts.items()},
        }
