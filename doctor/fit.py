"""The memory of a run, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frugalpath.doctor.jobs import Job, Sizes, jobs_of, learned_tokens
from frugalpath.doctor.ledger import Moment
from frugalpath.doctor.subject import Subject
from frugalpath.doctor.tracing import Update, prepared, trace
from frugalpath.models.attention import decoder
from frugalpath.models.feature_bank import CACHE_MB, COLUMNS
from frugalpath.models.vision_tower import HELD
from frugalpath.recipe.run import Run

GB = 1e9
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp")
STATES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0, "adafactor": 0}
"""Bytes of optimizer state per trained weight; other optimizers keep two values in the weight's dtype."""


@dataclass(frozen=True)
class Weights:
    """Number of parameters of a model in training, and bytes of their weights, gradients and optimizer state."""

    frozen: int
    trained: int
    adapters: int
    frozen_bytes: float
    trained_bytes: float
    adapters_bytes: float
    optimizer_bytes: float
    layer_bytes: float
    """Of one layer of the language model."""

    @property
    def gradients_bytes(self) -> float:
        """Bytes of all gradients; each has the dtype of its weight."""
        return self.trained_bytes + self.adapters_bytes


@dataclass(frozen=True)
class Place:
    """Devices of a run.

    Args:
        gpu: on GPUs, else on a CPU.
        processes: number of devices.
        sharding: one of `SHARDINGS`.
    """

    gpu: bool
    processes: int = 1
    sharding: str = "ddp"


@dataclass(frozen=True)
class Phase:
    """Peak memory of a phase: bytes by purpose, and the moment of the peak."""

    name: str
    parts: Mapping[str, float]
    moment: str

    @property
    def peak(self) -> float:
        """Peak memory in bytes."""
        return sum(self.parts.values())


def weigh(subject: Subject, trains: tuple[Any, Any], optimizer: str | None) -> Weights:
    """Count a model's parameters by building it without memory.

    Args:
        trains: adapters and learning rates of the trained parts.
        optimizer: its name; None if nothing is trained.
    """
    with torch.device("meta"):
        model = prepared(subject.build(), subject, *trains)
    sums: dict[str, list[float]] = {kind: [0, 0] for kind in ("frozen", "trained", "adapters")}
    states = 0.0
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        learns = optimizer is not None and parameter.requires_grad
        kind = "adapters" if adapter else "trained" if learns else "frozen"
        sums[kind][0] += parameter.numel()
        sums[kind][1] += parameter.nbytes
        if learns:
            states += parameter.numel() * STATES.get(str(optimizer), 2 * parameter.itemsize)
    layer = sum(p.nbytes for p in decoder(model).layers[0].parameters())
    (frozen, trained, adapters), (frozen_bytes, trained_bytes, adapters_bytes) = zip(*sums.values(), strict=True)
    numbers = int(frozen), int(trained), int(adapters)
    return Weights(*numbers, frozen_bytes, trained_bytes, adapters_bytes, states, layer)


def phase_of(subject: Subject, job: Job, place: Place, kept: Mapping[str, float] | None = None) -> Phase:
    """Estimate the memory of a phase on one device.

    Args:
        kept: bytes kept across phases, by purpose.
    """
    weights = weigh(subject, job.trains, job.optimizer)
    traced = trace(subject, job.work, place.gpu)
    training = isinstance(job.work, Update)
    full = weights.gradients_bytes
    moments = dict(traced.moments)
    if training:
        moments["optimizer"] = Moment(full, full)
    accumulates = isinstance(job.work, Update) and job.work.accumulates

    def held(moment: Moment) -> float:
        return moment.peak + (full if accumulates and moment is not moments.get("optimizer") else 0)

    name, worst = max(moments.items(), key=lambda item: held(item[1]))
    gradients = (full if accumulates else worst.gradients) if training else 0.0
    working = worst.peak - worst.gradients
    parts: dict[str, float] = {
        "frozen weights": weights.frozen_bytes,
        "trained weights": weights.trained_bytes,
        "adapters": weights.adapters_bytes,
        "optimizer": weights.optimizer_bytes,
        "gradients": gradients,
    }
    if job.reference:
        parts["reference"] = weights.frozen_bytes + weights.trained_bytes
    if training:
        activations = 0.0 if name == "optimizer" else min(traced.kept, working)
        parts["activations"] = activations
        parts["fused head" if name.startswith("head") else "working"] = working - activations
    else:
        cache = traced.kept if name == "decode" else 0.0
        parts["KV cache"] = cache
        parts["working"] = working - cache
    parts = {**parts, **(kept or {})}
    return Phase(job.name, {k: v for k, v in _shared_out(parts, weights, place).items() if v}, name)


def _shared_out(parts: dict[str, float], weights: Weights, place: Place) -> dict[str, float]:
    """Share of the memory that one of several processes holds."""
    count, kind = place.processes, place.sharding
    if count == 1:
        return parts
    if kind == "ddp":
        return {**parts, "buckets of DDP": weights.gradients_bytes if parts["optimizer"] else 0.0}
    divided = {"optimizer", "gradients"}
    if kind in ("zero3", "fsdp"):
        divided |= {"frozen weights", "trained weights", "adapters", "reference"}
    out = {k: v / count if k in divided else v for k, v in parts.items()}
    if kind in ("zero3", "fsdp"):
        # The layer that works and the one that is fetched for it.
        out["gathered layers"] = 2 * weights.layer_bytes
    return out


def features_held(run: Run, subject: Subject, sizes: Sizes, images: int | None) -> float:
    """Bytes of visual features that are cached across steps.

    slide_vlm caches them in main memory, families with a vision tower on the device.

    Args:
        images: number of images or slides; None if unknown, which assumes a full cache.
    """
    config, rows, most = subject.config, sum(run.ladder), HELD
    if config.model_type == "slide_vlm":
        wide, most = 4.0 * (config.feature_dim + COLUMNS), CACHE_MB * 2.0**20
        if learned_tokens(config) is not None:
            rows = sizes.patches  # whatever the budget
    else:
        if not (run.performer.freeze_vision and run.grpo.see_once):
            return 0.0
        if run.grpo.vision_cache and Path(run.grpo.vision_cache).is_dir():
            return 0.0  # a run before has seen them, and what is read from disk stays in the main memory
        wide = float(subject.text.hidden_size * (2 if run.grpo.bf16 else subject.dtype.itemsize))
        if config.model_type == "gemma3":
            rows = config.mm_tokens_per_image  # one grid, which is pooled to each budget
    return most if images is None else min(most, images * rows * wide)


def fit(run: Run, subject: Subject, sizes: Sizes, place: Place, images: int | None = None) -> list[Phase]:
    """Estimate the memory of all phases of a recipe.

    Args:
        images: see `features_held`.
    """
    held = features_held(run, subject, sizes, images)
    on_device = not place.gpu or subject.config.model_type != "slide_vlm"
    return [
        phase_of(subject, job, place, {"features": held} if on_device else None)
        for job in jobs_of(run, subject, sizes)
    ]


def peak(phases: Sequence[Phase]) -> Phase:
    """The phase with the highest peak."""
    return max(phases, key=lambda phase: phase.peak)
