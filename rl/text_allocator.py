"""The allocator that writes a budget learns by GRPO against the frozen performer (BiRR4CPath, methods 1.2 and 1.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.frozen import FrozenAnswers
from frugalpath.allocator.text import (
    LEAST,
    BudgetWriter,
    TextAllocator,
    new_writer,
    read_budget,
    read_writer,
    text_key,
)
from frugalpath.distributed import is_main
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.recipe.checkpoints import Clock, MarkWhole, is_done, last_whole, mark_done, mark_started, train_from
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.rewards.answer import Completion
from frugalpath.rewards.cost import worth
from frugalpath.rewards.format import format_reward
from frugalpath.rl.rollout import Rollout
from frugalpath.rl.trainer import GroupTrainer
from frugalpath.sft.stages import trained as record_of
from frugalpath.sft.supervised import BudgetCollator, StageTrainer, sft_config


class TextTrainer(GroupTrainer):
    """GRPO of the adapter that writes a budget.

    Args:
        allocator: its adapter is trained. cases: the training cases, by the `index` column of the training set.
    """

    def __init__(self, *args: Any, allocator: BudgetWriter, cases: Sequence[Case], **kwargs: Any):
        self.allocator, self.cases = allocator, cases
        super().__init__(*args, **kwargs)
        if self._dist.is_fsdp or self._dist.is_zero3:
            # The performer answers between the adapter's steps, in as many forwards as its cases ask for.
            raise InputError(
                "allocator.form: text trains an adapter beside a performer that answers meanwhile, whose weights must "
                "be whole on every process; launch it with configs/accelerate/zero2.yaml or one_gpu.yaml"
            )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        batch = self._batch = Rollout()
        shared: dict[str, Any] = {}
        for at, row in enumerate(inputs):
            if not at or row["index"] != inputs[at - 1]["index"]:
                case = self.cases[row["index"]]
                prompt = self.allocator.prompt(case)
                shared = {"prompt": self.allocator.messages(case, prompt.views), "views": prompt.views}
                batch.prompts.append(prompt)
            batch.rows.append(len(batch.prompts) - 1)
            rows.append({**row, **shared})
        return super()._generate_and_score_completions(rows)

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        # The allocator has read them.
        return self._batch.ids(), None, {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The reference that TRL keeps beside the adapter stays what the stage began with.
        weights = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        set_peft_model_state_dict(self.allocator.model, weights)


class TokenReward:
    """What a budget that was asked for is worth, by the score of the frozen performer's greedy answer at it.

    Args:
        allocator: it reads and holds budgets. answers: of the performer. cases: by the `index` column.
        preset: see `TextOptions`. price: lambda. ladder: of the run; the largest is the unit of cost.
    """

    __name__ = "tokens"

    def __init__(
        self,
        allocator: BudgetWriter,
        answers: FrozenAnswers,
        cases: Sequence[Case],
        preset: str,
        price: float,
        ladder: Sequence[int],
    ):
        self.allocator, self.answers, self.cases = allocator, answers, cases
        self.preset, self.price, self.ladder = preset, price, ladder

    def __call__(self, completions: Sequence[Completion], index: Sequence[int], **columns: Any) -> list[float]:
        """Rewards (n,); one without a readable budget is the worst."""
        numbers = [read_budget(c) for c in completions]
        cases = [self.cases[i] for i in index]
        held = [self.allocator.held(case, number) for case, number in zip(cases, numbers, strict=True)]
        read = [at for at, number in enumerate(numbers) if number is not None]
        score = np.full(len(cases), np.nan)
        with self.allocator.model.disable_adapter():
            scored = self.answers([cases[at] for at in read], [held[at] for at in read])
        score[read] = [s.score for s in scored]
        if log := columns.get("log_metric"):
            log("allocator/readable", len(read) / len(cases))
            log("allocator/tokens", float(np.mean(held)))
        if self.preset == "birr":
            # As published: of the number that was written, below the tokens that the image has.
            tokens = np.array([0.0 if n is None else float(n) for n in numbers])
            cap: Any = np.array([min(self.allocator.native(case), self.ladder[-1]) for case in cases], dtype=float)
        else:
            tokens, cap = np.array(held, dtype=float), float(self.ladder[-1])
        cost = np.array(held) / self.ladder[-1]
        return worth(self.preset, score, tokens, cost, self.price, cap).tolist()


def fit_text(trained: TrainedRun) -> TextAllocator:
    """Train the adapter, or read it from the run's folder."""
    return TextAllocator(trained, train_text(trained))


def train_text(trained: TrainedRun) -> BudgetWriter:
    """The performer's adapter that writes budgets, trained; a finished stage is read from the run's folder.

    The performer is frozen. Its model gets the adapter, which is left off.
    """
    data, performer = trained.data, trained.performer
    run, folder = data.run, data.run.folder / "text"
    options = run.allocator.text
    parts = text_key(trained)
    if is_done(folder, parts):
        return read_writer(trained)
    allocator = _warm_start(trained)
    train = data.splits["train"]
    mark_started(folder, parts)
    resumed = last_whole(folder)
    clock = Clock(resumed)
    answers = FrozenAnswers(performer, data.scorer, data.max_new_tokens, run.evaluation.batch_size)
    reward = TokenReward(allocator, answers, train, options.preset, run.allocator.price, run.ladder)
    args = text_config(run.grpo, folder, options.grpo)
    args.reward_weights = [1.0, options.format_weight]
    rows = [{"index": i, "prompt": allocator.messages(c)} for i, c in enumerate(train)]
    with allocator.speaking():
        trainer = TextTrainer(
            model=allocator.model,
            reward_funcs=[reward, format_reward],
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=performer.processor,
            callbacks=[MarkWhole(clock)],
            allocator=allocator,
            cases=train,
        )
        train_from(trainer, resumed)
    if "ref" in allocator.model.peft_config:
        allocator.model.delete_adapter("ref")
    if is_main():
        allocator.save(folder)
        record = record_of(trainer)
        mark_done(folder, parts, **{**record, "flops": record["flops"] + answers.flops}, seconds=clock.seconds)
    return allocator


def text_config(recipe: FrugalConfig, folder: Path, changes: dict[str, Any]) -> FrugalConfig:
    """The recipe's GRPO arguments with those of the stage.

    Raises:
        InputError: an unknown argument, or one that GRPO refuses.
    """
    # vLLM would be started a second time, for a few tokens a completion.
    derived: dict[str, Any] = {"generation_batch_size": None, "use_vllm": False}
    if recipe.steps_per_generation == recipe.gradient_accumulation_steps:
        derived["steps_per_generation"] = None  # TRL's own default
    fixed = {"output_dir": str(folder), "budgets_per_image": 1, "mode": "joint"}
    try:
        return dataclasses.replace(recipe, **{**derived, **changes, **fixed})
    except (TypeError, ValueError) as error:
        raise InputError(f"allocator.text.grpo: {error}") from error


def _warm_start(trained: TrainedRun) -> BudgetWriter:
    """A new adapter, taught to write budgets of the ladder if the recipe wants it."""
    data, performer = trained.data, trained.performer
    run, folder = data.run, data.run.folder / "text_warm_start"
    options = run.allocator.text
    if options.warm_start is None:
        torch.manual_seed(run.grpo.seed)
        return new_writer(trained, options.lora)
    own = {"look": options.look, "lora": options.lora, "warm_start": options.warm_start}
    parts = {**trained.key, "text": own}
    if is_done(folder, parts):
        return new_writer(trained, folder)
    torch.manual_seed(run.grpo.seed)
    allocator = new_writer(trained, options.lora)
    rows = [
        dataclasses.replace(case, answer=str(max(LEAST, allocator.held(case, budget))))
        for case in data.splits["train"]
        for budget in run.ladder
    ]
    mark_started(folder, parts)
    resumed = last_whole(folder)
    clock = Clock(resumed)
    with allocator.speaking():
        trainer = StageTrainer(
            model=allocator.model,
            args=sft_config(folder, options.warm_start, run.grpo.seed),
            data_collator=BudgetCollator(allocator.asking, rows, [allocator.look], 0.0, run.grpo.seed),
            train_dataset=Dataset.from_dict({"index": list(range(len(rows)))}),
            processing_class=performer.processor,
            callbacks=[MarkWhole(clock)],
        )
        train_from(trainer, resumed)
    if is_main():
        allocator.save(folder)
        mark_done(folder, parts, **record_of(trainer), seconds=clock.seconds)
    return allocator
