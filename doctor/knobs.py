"""Changes to a recipe that does not fit, and what each saves."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from frugalpath.doctor.fit import Phase, Place, fit, peak
from frugalpath.doctor.jobs import Sizes, stage_arguments
from frugalpath.doctor.subject import Subject
from frugalpath.recipe.run import Run
from frugalpath.recipe.sft import Stage

HARMLESS, SLOWER, DIFFERENT = range(3)
"""Cost of a change: only smaller batches; time or machines; or different results."""
HARM = ("same results", "slower, or more GPUs", "other results")
LORA = {"r": 16, "lora_alpha": 64}
"""Suggested adapters, as published for BiRR4CPath."""


@dataclass(frozen=True)
class Change:
    """A change to a recipe.

    Args:
        setting: as written on the command line.
        harm: one of the three costs above.
        run, place: recipe and devices after the change.
    """

    setting: str
    harm: int
    run: Run
    place: Place


@dataclass(frozen=True)
class Knob:
    """Effect of a change on the peak memory, in bytes."""

    setting: str
    harm: int
    saves: float
    peak: float


def turned(
    run: Run, subject: Subject, sizes: Sizes, place: Place, images: int | None, phases: Sequence[Phase]
) -> list[Knob]:
    """List the changes that lower the peak, least harm first, then largest saving.

    Args:
        phases: phases of the unchanged recipe.
    """
    before = peak(phases)
    found = []
    for change in changes(run, place, before.name):
        own = subject
        if change.run.performer != run.performer:
            own = Subject.of(change.run.performer, getattr(subject.config, "feature_dim", 0))
        after = peak(fit(change.run, own, sizes, change.place, images)).peak
        if before.peak - after > 1e6:
            found.append(Knob(change.setting, change.harm, before.peak - after, after))
    return sorted(found, key=lambda k: (k.harm, -k.saves))


def changes(run: Run, place: Place, phase: str) -> Iterator[Change]:
    """Changes that may lower the memory of a phase."""
    stages = {stage.name: stage for stage in run.sft}
    if phase == "evaluation":
        half = max(1, run.evaluation.batch_size // 2)
        for size in sorted({half, max(1, half // 4)}, reverse=True):
            options = replace(run.evaluation, batch_size=size)
            yield Change(f"evaluation.batch_size={size}", HARMLESS, replace(run, evaluation=options), place)
    elif phase in stages:
        yield from _of_stage(run, place, stages[phase])
    else:
        yield from _of_grpo(run, place, phase)
    if run.performer.lora is None and (run.performer.freeze_vision or run.performer.family != "qwen_vl"):
        keys = ", ".join(f"{key}: {value}" for key, value in LORA.items())
        with_lora = replace(run, performer=replace(run.performer, lora=dict(LORA)))
        yield Change(f"performer.lora={{{keys}}}", DIFFERENT, with_lora, place)
    if len(run.ladder) > 1:
        shorter = replace(run, ladder=run.ladder[:-1])
        yield Change(f"--ladder {' '.join(map(str, shorter.ladder))}", DIFFERENT, shorter, place)
    length = run.grpo.max_completion_length // 2
    if length:
        yield Change(f"--max_completion_length {length}", DIFFERENT, _grpo(run, max_completion_length=length), place)
    if place.gpu and place.processes == 1 and phase != "evaluation":
        for kind, name in (("zero2", "ZeRO-2"), ("fsdp", "ZeRO-3 or FSDP2")):
            yield Change(f"{name} over 2 GPUs (configs/accelerate)", SLOWER, run, Place(True, 2, kind))
    if run.grpo.vision_cache is None and run.performer.family == "qwen_vl" and run.grpo.see_once:
        setting = "--vision_cache FOLDER (from the second run on: what is found there stays in the main memory)"
        cached = replace(run, grpo=_changed(run.grpo, vision_cache=os.curdir))  # any folder that is there
        yield Change(setting, HARMLESS, cached, place)


def _of_stage(run: Run, place: Place, stage: Stage) -> Iterator[Change]:
    args = stage_arguments(run, stage)
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    where = "sft" if len(run.sft) == 1 else f"sft.{stage.kind}"

    def changed(**options: Any) -> Run:
        new = replace(stage, options={**stage.options, **options})
        return replace(run, sft=[new if s is stage else s for s in run.sft])

    if rows > 1:
        own = {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": steps * 2}
        text = " ".join(f"{where}.{key}={value}" for key, value in own.items())
        yield Change(text, HARMLESS, changed(**own), place)
    if not args.gradient_checkpointing:
        setting = f"{where}.gradient_checkpointing=true"
        yield Change(setting, SLOWER, changed(gradient_checkpointing=True), place)


def _of_grpo(run: Run, place: Place, phase: str) -> Iterator[Change]:
    args = run.grpo
    batch, steps, total = (
        args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation,
    )  # fmt: skip
    if batch % 2 == 0:
        own = {
            "per_device_train_batch_size": batch // 2,
            "gradient_accumulation_steps": steps * 2,
            "steps_per_generation": total * 2,
        }
        yield Change(" ".join(f"--{k} {v}" for k, v in own.items()), HARMLESS, _grpo(run, **own), place)
    block = args.budgets_per_image * args.num_generations
    if phase == "generation" and total % 2 == 0 and batch * total // 2 % block == 0:
        own = {"steps_per_generation": total // 2}
        yield Change(f"--steps_per_generation {total // 2}", HARMLESS, _grpo(run, **own), place)
    if not args.gradient_checkpointing:
        setting = "--gradient_checkpointing true"
        yield Change(setting, SLOWER, _grpo(run, gradient_checkpointing=True), place)


def _changed(args: Any, **values: Any) -> Any:
    args = copy.copy(args)
    for key, value in values.items():
        setattr(args, key, value)
    return args


def _grpo(run: Run, **values: Any) -> Run:
    return replace(run, grpo=_changed(run.grpo, **values))
