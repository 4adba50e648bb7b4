"""Jobs of a recipe whose memory can be traced: supervised stages, rollouts, update, evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from frugalpath.doctor.subject import Subject
from frugalpath.doctor.tracing import Seen, Update, Writing
from frugalpath.models.build import PerformerConfig
from frugalpath.models.compressors.chain import Chain
from frugalpath.recipe.run import Run
from frugalpath.recipe.sft import Stage
from frugalpath.sft.supervised import OWN_KEYS, adapters_of, sft_config, stage_rates


@dataclass(frozen=True)
class Sizes:
    """Sizes that depend on the data, not on the recipe.

    Args:
        text: tokens of a question with its chat template.
        answer: tokens of a gold answer; None assumes the longest completion.
        patches: stored features per slide, for learned compressors.
    """

    text: int = 128
    answer: int | None = None
    patches: int = 4096


@dataclass(frozen=True)
class Job:
    """A phase of a run.

    Args:
        work: the work of one micro-step, or of one batch of completions.
        per_step: repetitions per optimizer step; 0 outside training steps.
        trains: adapters and learning rates of the parts trained in this phase.
        optimizer: name of the optimizer; None without one.
        reference: whether a second model is kept for the KL term.
    """

    name: str
    work: Update | Writing
    per_step: float
    trains: tuple[Mapping[str, Any] | None, Mapping[str, float] | None]
    optimizer: str | None
    reference: bool = False


def jobs_of(run: Run, subject: Subject, sizes: Sizes) -> list[Job]:
    """Phases of a recipe in order, without stages that need no language model, which take less memory."""
    jobs = [_supervised(run, subject, stage, sizes) for stage in run.sft if not stage.no_language_model]
    return [*jobs, *_grpo(run, subject, sizes), _evaluation(run, subject, sizes)]


def shown(subject: Subject, budget: int, patches: int) -> tuple[Seen, int]:
    """Visual input of a prompt at a budget, and the number of text positions it takes."""
    config = subject.config
    if config.model_type != "slide_vlm":
        return Seen(budget, budget), budget
    learned = learned_tokens(config)
    seen = Seen(budget, budget) if learned is None else Seen(min(budget, learned), patches, learned=True)
    return seen, seen.tokens + config.marker_tokens if config.in_text else 0


def learned_tokens(config: Any) -> int | None:
    """Maximum number of tokens of learned compressors; None without any."""
    with torch.device("meta"):
        chain = Chain(config.compressors, config.feature_dim, config.get_text_config().hidden_size)
    return chain.learned[-1].most if chain.learned else None  # type: ignore[return-value]


def _length(performer: PerformerConfig, sizes: Sizes, visual: int) -> int:
    return sizes.text * (2 if performer.repeat_prompt else 1) + visual


def stage_arguments(run: Run, stage: Stage) -> SFTConfig:
    """Trainer arguments of a stage, including its defaults."""
    options = {k: v for k, v in stage.options.items() if k not in OWN_KEYS}
    return sft_config(Path(run.grpo.output_dir) / stage.name, options, run.grpo.seed)


def _supervised(run: Run, subject: Subject, stage: Stage, sizes: Sizes) -> Job:
    rates = stage_rates(stage.kind, stage.options.get("learning_rates"))
    lora = adapters_of(stage.options, rates, run.performer.lora)
    args = stage_arguments(run, stage)
    seen, visual = shown(subject, stage.options.get("ladder", run.ladder)[-1], sizes.patches)
    answer = sizes.answer or run.grpo.max_completion_length
    rows = args.per_device_train_batch_size
    work = Update(
        rows=rows,
        length=_length(run.performer, sizes, visual) + answer,
        scored=rows * answer,
        prefix=0,
        seen=seen,
        checkpointing=args.gradient_checkpointing,
        bf16=bool(args.bf16),
        accumulates=args.gradient_accumulation_steps > 1,
        lora=lora,
        rates=rates,
        supervised=True,
    )
    return Job(stage.name, work, args.gradient_accumulation_steps, (lora, rates), str(args.optim))


def _grpo(run: Run, subject: Subject, sizes: Sizes) -> list[Job]:
    args, lora = run.grpo, run.performer.lora
    seen, visual = shown(subject, run.ladder[-1], sizes.patches)
    prompt, written = _length(run.performer, sizes, visual), args.max_completion_length
    group, batch = args.num_generations, args.per_device_train_batch_size
    width = min(group, batch)
    packed = args.shared_prefix
    update = Update(
        rows=math.ceil(batch / group) if packed else batch,
        length=prompt - 1 + width * (written + 1) if packed else prompt + written,
        scored=batch * written,
        prefix=prompt - 1 if packed else 0,
        seen=seen,
        checkpointing=args.gradient_checkpointing,
        bf16=bool(args.bf16),
        accumulates=args.gradient_accumulation_steps > 1,
        lora=lora,
    )
    prompts = max(1, batch * args.steps_per_generation // group)
    copies = group - args.gold_rollout
    writing = Writing(
        prompts=prompts if args.prefill_once else prompts * group,
        width=copies if args.prefill_once else 1,
        length=prompt,
        written=written,
        seen=seen,
        bf16=bool(args.bf16),
        trained=True,
        lora=lora,
    )
    often = args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    shared: dict[str, Any] = {
        "trains": (lora, None),
        "optimizer": str(args.optim),
        "reference": bool(args.beta) and lora is None,
    }
    return [
        Job("generation", writing, often, **shared),
        Job("grpo", update, args.gradient_accumulation_steps, **shared),
    ]


def _evaluation(run: Run, subject: Subject, sizes: Sizes) -> Job:
    seen, visual = shown(subject, run.ladder[-1], sizes.patches)
    work = Writing(
        prompts=run.evaluation.batch_size,
        width=1,
        length=_length(run.performer, sizes, visual),
        written=run.evaluation.max_new_tokens or run.grpo.max_completion_length,
        seen=seen,
        bf16=False,
        trained=False,
        lora=None,
    )
    return Job("evaluation", work, 0, (None, None), None)
