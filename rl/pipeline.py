"""What follows the supervised stages of a run: GRPO of both policies, the fit of the allocator, the controls."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from frugalpath.allocator.base import Allocator, TrainedRun
from frugalpath.allocator.cascade import fit_cascade
from frugalpath.allocator.collapse import CollapseGuard
from frugalpath.allocator.frozen import FrozenAnswers, Plan, learn_from_frozen
from frugalpath.allocator.network import AllocatorNetwork
from frugalpath.allocator.objectives import objective_of
from frugalpath.allocator.online import AllocatorLearner, network_class, new_learner
from frugalpath.allocator.policy import PolicyNetwork, fit_policy
from frugalpath.allocator.score_table import RunTables, ScoreTable
from frugalpath.allocator.value import ValueNetwork, fit_value
from frugalpath.distributed import renew
from frugalpath.envs.case import case_columns, extra_columns
from frugalpath.errors import InputError
from frugalpath.models.build import lora_config
from frugalpath.models.performer import Performer
from frugalpath.recipe.cache_key import grpo_key, sft_key
from frugalpath.recipe.checkpoints import Clock, MarkWhole, is_done, last_whole, mark_started, train_from
from frugalpath.recipe.data import RunData
from frugalpath.rl.joint import FrugalTrainer
from frugalpath.rl.text_allocator import fit_text
from frugalpath.rl.vllm_rollouts import require_vllm
from frugalpath.sft.stages import base, finish_stage, load_stage, sft_continued, warm_start
from frugalpath.sft.stages import trained as record_of
from frugalpath.sft.supervised import merged

PERFORMER = "grpo_performer"
"""Folder of the performer's GRPO where the allocator learns after it."""


def train_joint(data: RunData) -> tuple[Performer, AllocatorNetwork]:
    """The performer and the allocator's network after GRPO; a finished stage is read from the run's folder.

    Raises:
        InputError: the supervised stages end with one that teaches no answers.
    """
    run = data.run
    check_answers(run.sft)
    folder, key = run.folder / "grpo", grpo_key(data)
    if not is_done(folder, key):
        if run.grpo.use_vllm:
            require_vllm()  # before the supervised stages take their hours
        if run.grpo.mode == "sequential":
            _performer_then_allocator(data, folder, key)
        else:
            performer = warm_start(data)
            learner = new_learner(data, performer)
            _grpo(data, folder, key, performer, learner, allocator=learner.allocator)
    return load_stage(data, "grpo"), network_class(run).from_pretrained(folder / "allocator")


def trained_run(data: RunData, performer: Performer) -> TrainedRun:
    """What an allocator is fitted on."""
    key = grpo_key(data)
    return TrainedRun(data, performer, objective_of(data, performer), RunTables(data, "grpo", performer, key), key)


def fit_allocator(trained: TrainedRun, start: AllocatorNetwork) -> Allocator:
    """An allocator of the recipe's form that is ready to decide.

    Args:
        start: the jointly trained network.
    """
    form = trained.data.run.allocator.form
    if form == "text":
        return fit_text(trained)
    if form == "policy" and isinstance(start, PolicyNetwork):
        return fit_policy(trained, start)
    if form == "value" and isinstance(start, ValueNetwork):
        return fit_value(trained, start)
    if form == "cascade":
        return fit_cascade(trained)
    raise TypeError(f"no allocator of the form {form} starts from a {type(start).__name__}")


def control_tables(data: RunData) -> dict[str, Mapping[str, ScoreTable]]:
    """Tables of the performer before GRPO: untrained, after SFT, and after SFT that went on for equal compute."""
    ladder, key = data.run.ladder, sft_key(data)
    found: dict[str, Mapping[str, ScoreTable]] = {}
    found["base"] = RunTables(data, "base", base(data), {**key, "sft": []}, [ladder[-1]])
    found["sft"] = RunTables(data, "sft", warm_start(data), key, ladder)
    if data.run.evaluation.sft_continued and data.run.sft:
        longer = {**key, "sft_continued": grpo_key(data)}
        found["sft_continued"] = RunTables(data, "sft_continued", sft_continued(data), longer, ladder)
    return found


def check_answers(sft: list[Any]) -> None:
    """Refuse supervised stages after which there is nothing that GRPO could start from.

    Raises:
        InputError: the last one teaches no answers.
    """
    if sft and sft[-1].no_language_model:
        raise InputError(
            f"sft: after the stage {sft[-1].kind} nothing answers questions yet, which GRPO starts from; "
            "add align, case or warm_start, or run sft/train.py alone"
        )


def _performer_then_allocator(data: RunData, folder: Path, key: dict[str, Any]) -> None:
    """GRPO of the performer alone, then the allocator's learning from its answers."""
    run = data.run
    alone = {k: v for k, v in key.items() if k != "allocator"}
    if not (before := is_done(run.folder / PERFORMER, alone)):
        performer = warm_start(data)
        _grpo(data, run.folder / PERFORMER, alone, performer, new_learner(data, performer, explore=1.0))
        before = is_done(run.folder / PERFORMER, alone)
    assert before is not None
    mark_started(folder, key)
    resumed = last_whole(folder)
    clock, guard = Clock(resumed), CollapseGuard()
    performer = load_stage(data, PERFORMER)
    learner = new_learner(data, performer)
    args = run.grpo
    # As many updates, on as many images each, as the joint step makes.
    each = args.steps_per_generation * args.num_iterations
    steps = max(1, before["steps"] * args.gradient_accumulation_steps // each)
    images = args.generation_batch_size // (args.budgets_per_image * args.num_generations)
    save, log_every = ((n if n >= 1 else n * steps) for n in (args.save_steps, args.logging_steps))
    if args.save_strategy == "no":
        save = steps + 1
    intervals = max(1, int(save)), max(1, int(log_every))
    if run.allocator.form == "text":
        steps = 0  # the adapter that writes budgets learns in their place
    plan = Plan(steps, images, args.budgets_per_image, args.seed, *intervals)
    answers = FrozenAnswers(performer, data.scorer, data.max_new_tokens, run.evaluation.batch_size)
    log = learn_from_frozen(learner, answers, data.splits["train"], plan, folder, resumed, clock, guard.read)
    record = {"steps": plan.steps, "flops": before["flops"] + answers.flops, "log": log}
    warnings = [*before["warnings"], *guard.warnings]
    finish_stage(folder, key, performer, clock, learner.allocator, **record, warnings=warnings)


def _grpo(
    data: RunData,
    folder: Path,
    key: dict[str, Any],
    performer: Performer,
    learner: AllocatorLearner,
    allocator: AllocatorNetwork | None = None,
) -> None:
    """Train the performer at the learner's budgets and write the stage's folder."""
    mark_started(folder, key)
    resumed = last_whole(folder)
    clock = Clock(resumed)
    train = data.splits["train"]
    extra = extra_columns(data.cases)
    rows = [{"index": i, "prompt": performer.messages(c), **case_columns(c, extra)} for i, c in enumerate(train)]
    guard = CollapseGuard()
    args = copy.copy(data.run.grpo)
    args.output_dir = str(folder)
    args.reward_weights = [r.weight for r in data.rewards]
    renew(args)
    trainer = FrugalTrainer(
        model=performer.model,
        reward_funcs=list(data.rewards),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=performer.processor,
        callbacks=[guard, MarkWhole(clock)],
        peft_config=lora_config(data.run.performer, performer.model),
        performer=performer,
        cases=train,
        learner=learner,
        score_weights=[r.score_weight for r in data.rewards],
    )
    train_from(trainer, resumed)
    model = merged(trainer)
    if data.run.performer.lora is not None:
        performer.model = model
    finish_stage(folder, key, performer, clock, allocator, **record_of(trainer), warnings=guard.warnings)
