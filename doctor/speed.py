"""Estimate the time of a training step from its FLOPs (`frugalpath.models.cost`) and the device's rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from frugalpath.doctor.fit import weigh
from frugalpath.doctor.jobs import Job
from frugalpath.doctor.machine import Speed
from frugalpath.doctor.subject import Subject
from frugalpath.doctor.tracing import Update, Writing
from frugalpath.models.cost import DecoderShape, SquareTowerShape, TowerShape


@dataclass(frozen=True)
class Cost:
    """Cost of a phase per optimizer step.

    Args:
        flops: FLOPs of the phase.
        seconds: time at the given rates.
        tokens: positions read or written.
    """

    name: str
    flops: float
    seconds: float
    tokens: float


def cost_of(subject: Subject, job: Job, speed: Speed, mfu: float) -> Cost:
    """FLOPs and seconds of a phase in one optimizer step; of an evaluation, of one batch.

    Args:
        mfu: share of the peak rate reached in training.
    """
    shape, often = DecoderShape.from_config(subject.text), job.per_step or 1.0
    if isinstance(job.work, Update):
        flops, tokens = _update(shape, job.work), float(job.work.rows * job.work.length)
        return Cost(job.name, often * flops, often * flops / (speed.flops * mfu), often * tokens)
    work = job.work
    read = work.prompts * (shape.prefill(work.length) + _see(subject, work))
    written = work.prompts * work.width * shape.decode(work.written, work.length)
    # A token of each completion needs all weights and its cache read, whatever their number.
    weights = weigh(subject, job.trains, job.optimizer)
    total = weights.frozen_bytes + weights.trained_bytes + weights.adapters_bytes
    cache = 2.0 * shape.layers * shape.kv_width * subject.dtype.itemsize
    cache *= work.prompts * (work.length + work.width * work.written / 2)
    loading = (work.written - 1) * (total + cache) / speed.bytes
    seconds = read / (speed.flops * mfu) + max(written / (speed.flops * mfu), loading)
    tokens = work.prompts * (work.length + work.width * work.written)
    return Cost(job.name, often * (read + written), often * seconds, often * tokens)


def _update(shape: DecoderShape, work: Update) -> float:
    """FLOPs of the forward and backward passes of a micro-step."""
    if work.prefix:
        # Each completion reads the prompt and itself.
        prompt, suffixes = work.prefix, work.rows * (work.length - work.prefix)
        own = suffixes / max(1, suffixes - work.scored)
        pairs = work.rows * prompt * (prompt + 1) / 2 + suffixes * (prompt + (own + 1) / 2)
    else:
        pairs = work.rows * work.length * (work.length + 1) / 2
    forward = work.rows * work.length * shape.per_token + 4.0 * shape.layers * shape.queries * pairs
    forward += 2.0 * work.scored * shape.hidden * shape.vocab
    # A frozen weight has no gradient of its own; activations that are not kept are computed again.
    frozen = work.lora is not None or (work.rates is not None and "language" not in work.rates)
    return forward * (2 + (not frozen) + work.checkpointing)


def _see(subject: Subject, work: Writing) -> float:
    """FLOPs of the vision tower for a new image."""
    config = subject.config
    if config.model_type == "qwen2_5_vl":
        return TowerShape.from_config(config.vision_config).read(work.seen.tokens)
    if config.model_type == "gemma3":
        square = SquareTowerShape.from_config(config.vision_config, config.mm_tokens_per_image)
        return square.read(subject.text.hidden_size)
    return 0.0


def step_seconds(costs: Sequence[Cost]) -> float:
    """Seconds of a GRPO step, with rollouts and update."""
    return sum(c.seconds for c in costs if c.name in ("generation", "grpo"))
