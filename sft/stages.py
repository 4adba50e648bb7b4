"""Supervised stages of a run: each writes a folder, resumes if interrupted, and is skipped once finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from frugalpath.distributed import is_main
from frugalpath.models.build import build_performer, load_performer
from frugalpath.models.performer import Performer
from frugalpath.recipe.cache_key import grpo_key, sft_key
from frugalpath.recipe.checkpoints import Clock, MarkWhole, is_done, last_whole, mark_done, mark_started
from frugalpath.recipe.data import RunData
from frugalpath.recipe.run import BUDGET_TEXTS
from frugalpath.recipe.sft import Stage
from frugalpath.sft.running import Supervision


def warm_start(data: RunData) -> Performer:
    """Run the stages of `sft` in order; without any, return the recipe's performer."""
    stages, folder = data.run.sft, data.run.folder
    done = [at for at, stage in enumerate(stages) if is_done(folder / stage.name, sft_key(data, at + 1))]
    performer = load_stage(data, stages[done[-1]].name) if done else base(data)
    for at in range(done[-1] + 1 if done else 0, len(stages)):
        performer = _train(data, stages[at], performer, sft_key(data, at + 1))
    return performer


def base(data: RunData) -> Performer:
    """Load the recipe's performer before training."""
    run = data.run
    # What it will be asked by the form that writes budgets; otherwise a new tokenizer spells it byte by byte.
    texts = BUDGET_TEXTS if run.allocator.form == "text" else ()
    return placed(build_performer(run.performer, data.all_splits["train"], data.bank, run.grpo.seed, texts))


def sft_continued(data: RunData) -> Performer:
    """Continue the last stage for the FLOPs of the joint stage, as the control of equal compute."""
    folder, last, key = data.run.folder, data.run.sft[-1], sft_key(data)
    spent, before = is_done(folder / "grpo", grpo_key(data)), is_done(folder / "sft", key)
    assert spent is not None and before is not None
    steps = max(1, round(spent["flops"] / (before["flops"] / before["steps"])))
    longer = replace(last, name="sft_continued", options={**last.options, "max_steps": steps})
    key = {**key, "sft_continued": steps}
    if is_done(folder / longer.name, key):
        return load_stage(data, longer.name)
    return _train(data, longer, load_stage(data, "sft"), key)


def load_stage(data: RunData, name: str) -> Performer:
    """Load the performer of a finished stage."""
    return placed(load_performer(data.run.folder / name, data.run.performer, data.bank))


def placed(performer: Performer) -> Performer:
    """Move the performer to this process's device."""
    performer.model.to(PartialState().device)
    return performer


def finish_stage(
    folder: Path, key: dict[str, Any], performer: Performer, clock: Clock, allocator: Any = None, **record: Any
) -> None:
    """Write the trained weights of a stage, then mark it as finished."""
    if is_main():
        performer.save(folder)
        if allocator is not None:
            allocator.save_pretrained(folder / "allocator")
        mark_done(folder, key, **record, seconds=clock.seconds)
    PartialState().wait_for_everyone()


def trained(trainer: Any) -> dict[str, Any]:
    """Record of a trainer's work."""
    state = trainer.state
    return {"steps": state.global_step, "flops": state.total_flos, "log": state.log_history}


def _train(data: RunData, stage: Stage, performer: Performer, key: dict[str, Any]) -> Performer:
    """Train a stage, write its folder and load it again."""
    run, folder = data.run, data.run.folder / stage.name
    shared = Supervision(
        data.all_splits["train"], data.splits["val"], run.questions, run.ladder, run.performer, run.grpo.seed
    )
    mark_started(folder, key)
    resumed = last_whole(folder)
    clock = Clock(resumed)
    trainer, record = shared.run(stage, performer, folder, [MarkWhole(clock)], resumed)
    finish_stage(folder, key, performer, clock, **trained(trainer), **record)
    return load_stage(data, stage.name)
