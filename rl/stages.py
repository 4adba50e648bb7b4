"""The stages of a run. Each writes a folder, is skipped when that folder is finished, and resumes when it is not."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from frugalpath.allocator.collapse import CollapseGuard
from frugalpath.allocator.frozen import FrozenAnswers, Plan, learn_from_frozen
from frugalpath.allocator.network import AllocatorConfig, CheapLook, LookNetwork
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.online import AllocatorLearner, PolicyLearner, ValueLearner
from frugalpath.allocator.policy import PolicyAllocator, PolicyConfig
from frugalpath.allocator.score_table import ScoreTable, score_table
from frugalpath.allocator.text import SYSTEM, TURN
from frugalpath.allocator.value import ValueAllocator
from frugalpath.distributed import renew
from frugalpath.envs.case import case_columns, extra_columns
from frugalpath.errors import InputError
from frugalpath.models.build import build_performer, load_performer, lora_config
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.models.performer import Performer
from frugalpath.models.sharded import load_whole
from frugalpath.recipe.checkpoints import Clock, MarkWhole, is_done, last_whole, mark_done, train_from
from frugalpath.recipe.data import load_cases, load_features, load_rewards
from frugalpath.recipe.run import Run
from frugalpath.recipe.sft import Stage
from frugalpath.rewards.scoring import Scorer
from frugalpath.rl.joint import FrugalTrainer
from frugalpath.rl.vllm_rollouts import require_vllm
from frugalpath.sft.running import Supervision, asked
from frugalpath.sft.supervised import merged

logger = logging.getLogger(__name__)

# Keys of the GRPO arguments that do not change the result of a run.
NEUTRAL = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "logging_steps", "save_steps",
    "save_strategy", "save_total_limit", "resume_from_checkpoint", "log_level", "logging_strategy",
    # These follow from the number of processes; a finished run may be evaluated on any.
    "generation_batch_size", "use_cpu", "local_rank",
}  # fmt: skip

LOGGED = {
    "log_completions": False, "log_multimodal": True, "num_completions_to_print": None, "log_unique_prompts": False,
    "log_completions_hub_repo": None, "logging_first_step": False,
    # Where vLLM runs.
    "vllm_mode": "colocate", "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0, "vllm_group_port": 51216, "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "vllm_enable_sleep_mode": False,
}  # fmt: skip
"""Further such keys; what a stage is known by has them at these values, their defaults."""

AFTER = ("form", "weight_decay", "look_state", "look_confidence")
"""Keys of the allocator, two of them removed, that the joint step does not read, as those that begin with `fit_`."""

PERFORMER = "grpo_performer"
"""Folder of the performer's GRPO where the allocator learns after it."""

MODE_ALONE = {"joint": ("mode", "alternate_every"), "alternating": (), "sequential": ("alternate_every",)}
"""Keys that a mode does not depend on; runs in the first one are known without its name."""


class Stages:
    """A run's cases, rewards and features, and the stages that use them.

    Args:
        run: the parsed recipe.
    """

    def __init__(self, run: Run):
        self.run = run
        load_whole()
        self.all_splits = load_cases(run)
        self.splits = {s: list(asked(members, run.questions, "questions")) for s, members in self.all_splits.items()}
        self.cases = [c for members in self.splits.values() for c in members]
        self.rewards = load_rewards(run, self.cases)
        self.scorer = Scorer(self.rewards, run.ladder[-1])
        self.max_new_tokens = run.evaluation.max_new_tokens or run.grpo.max_completion_length

    @cached_property
    def bank(self) -> FeatureBank:
        """Stored features of all cases."""
        cases = [c for members in self.all_splits.values() for c in members]
        return load_features(cases, self.run.encoder, self.run.feature_folder)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return PartialState().is_main_process

    def warm_start(self) -> Performer:
        """The stages of `sft`, one after another; without any, the recipe's performer as it is."""
        stages = self.run.sft
        done = [
            at for at, stage in enumerate(stages) if is_done(self.run.folder / stage.name, self._sft_parts(at + 1))
        ]
        performer = self._load(stages[done[-1]].name) if done else self.base()
        for at in range(done[-1] + 1 if done else 0, len(stages)):
            performer = self._sft(stages[at], performer, self._sft_parts(at + 1))
        return performer

    def base(self) -> Performer:
        """The recipe's performer before any training here."""
        train, seed = self.all_splits["train"], self.run.grpo.seed
        # What it will be asked by the form that writes budgets; otherwise a new tokenizer spells it byte by byte.
        texts = (SYSTEM, TURN) if self.run.allocator.form == "text" else ()
        return self._placed(build_performer(self.run.performer, train, self.bank, seed, texts))

    def sft_continued(self) -> Performer:
        """The last stage trained on for the FLOPs that the joint stage took: the control of equal compute."""
        last, parts = self.run.sft[-1], self._sft_parts(len(self.run.sft))
        spent = is_done(self.run.folder / "grpo", self.grpo_parts())
        before = is_done(self.run.folder / "sft", parts)
        assert spent is not None and before is not None
        steps = max(1, round(spent["flops"] / (before["flops"] / before["steps"])))
        longer = replace(last, name="sft_continued", options={**last.options, "max_steps": steps})
        parts = {**parts, "sft_continued": steps}
        if is_done(self.run.folder / longer.name, parts):
            return self._load(longer.name)
        return self._sft(longer, self._load("sft"), parts)

    def joint(self) -> tuple[Performer, LookNetwork]:
        """GRPO of performer and allocator, in the recipe's mode.

        Raises:
            InputError: the supervised stages end with one that teaches no answers.
        """
        if self.run.sft and self.run.sft[-1].wordless:
            raise InputError(
                f"sft: after the stage {self.run.sft[-1].kind} nothing answers questions yet, which GRPO starts from; "
                "add align, case or warm_start, or run sft/train.py alone"
            )
        folder, parts = self.run.folder / "grpo", self.grpo_parts()
        if is_done(folder, parts):
            return self._load("grpo"), self.network.from_pretrained(folder / "allocator")
        if self.run.grpo.use_vllm:
            require_vllm()  # before the supervised stages take their hours
        if self.run.grpo.mode == "sequential":
            return self._after_performer(folder, parts)
        performer = self.warm_start()
        learner = self._learner(performer)
        self._grpo(folder, parts, performer, learner, allocator=learner.allocator)
        return self._load("grpo"), learner.allocator

    def _after_performer(self, folder: Path, parts: dict[str, Any]) -> tuple[Performer, LookNetwork]:
        """GRPO of the performer alone, then the allocator's learning from its answers."""
        alone = {k: v for k, v in parts.items() if k != "allocator"}
        if not (before := is_done(self.run.folder / PERFORMER, alone)):
            performer = self.warm_start()
            self._grpo(self.run.folder / PERFORMER, alone, performer, self._learner(performer, explore=1.0))
            before = is_done(self.run.folder / PERFORMER, alone)
        assert before is not None
        resumed = last_whole(folder)
        clock, guard = Clock(resumed), CollapseGuard()
        performer = self._load(PERFORMER)
        learner = self._learner(performer)
        args = self.run.grpo
        # As many updates, on as many images each, as the joint step makes.
        each = args.steps_per_generation * args.num_iterations
        steps = max(1, before["steps"] * args.gradient_accumulation_steps // each)
        images = args.generation_batch_size // (args.budgets_per_image * args.num_generations)
        save, log_every = ((n if n >= 1 else n * steps) for n in (args.save_steps, args.logging_steps))
        if args.save_strategy == "no":
            save = steps + 1
        intervals = max(1, int(save)), max(1, int(log_every))
        if self.run.allocator.form == "text":
            steps = 0  # the adapter that writes budgets learns in their place
        plan = Plan(steps, images, args.budgets_per_image, args.seed, *intervals)
        answers = FrozenAnswers(performer, self.scorer, self.max_new_tokens, self.run.evaluation.batch_size)
        log = learn_from_frozen(learner, answers, self.splits["train"], plan, folder, resumed, clock, guard.read)
        record = {"steps": plan.steps, "flops": before["flops"] + answers.flops, "log": log}
        warnings = [*before["warnings"], *guard.warnings]
        self._finish(folder, parts, performer, record, clock, learner.allocator, warnings=warnings)
        return self._load("grpo"), learner.allocator

    def _grpo(
        self,
        folder: Path,
        parts: dict[str, Any],
        performer: Performer,
        learner: AllocatorLearner,
        allocator: LookNetwork | None = None,
    ) -> None:
        """Train the performer at the learner's budgets and write the stage's folder."""
        resumed = last_whole(folder)
        clock = Clock(resumed)
        train = self.splits["train"]
        extra = extra_columns(self.cases)
        rows = [{"index": i, "prompt": performer.messages(c), **case_columns(c, extra)} for i, c in enumerate(train)]
        guard = CollapseGuard()
        args = copy.copy(self.run.grpo)
        args.output_dir = str(folder)
        args.reward_weights = [r.weight for r in self.rewards]
        renew(args)
        trainer = FrugalTrainer(
            model=performer.model,
            reward_funcs=list(self.rewards),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=performer.processor,
            callbacks=[guard, MarkWhole(clock)],
            peft_config=lora_config(self.run.performer, performer.model),
            performer=performer,
            cases=train,
            learner=learner,
            score_weights=[r.score_weight for r in self.rewards],
        )
        train_from(trainer, resumed)
        model = merged(trainer)
        if self.run.performer.lora is not None:
            performer.model = model
        self._finish(folder, parts, performer, trained(trainer), clock, allocator, warnings=guard.warnings)

    def table(self, name: str, performer: Performer, split: str, budgets: Sequence[int] | None = None) -> ScoreTable:
        """Score table of a stage's performer on a split, kept under `tables/`; budget 0 (no image) comes first."""
        budgets = list(budgets) if budgets is not None else [0, *self.run.ladder]
        path = self.run.folder / "tables" / f"{name}.{split}.jsonl"
        return score_table(
            performer,
            self.splits[split],
            budgets,
            self.scorer,
            self.max_new_tokens,
            self.run.evaluation.batch_size,
            path,
            label=f"{name} on {split}",
        )

    def rung_cost(self, performer: Performer) -> list[float]:
        """FLOPs of an answer at every rung, the largest = 1, in the mean over training questions."""
        sample = self.splits["train"][:: max(1, len(self.splits["train"]) // 100)]
        tokenizer = performer.processor.tokenizer
        written = [len(tokenizer(c.answer)["input_ids"]) + 5 for c in sample]
        flops = []
        for budget in self.run.ladder:
            prompts = [performer.prompt(c, budget) for c in sample]
            flops.append(sum(performer.flops(p, w) for p, w in zip(prompts, written, strict=True)))
        return [f / flops[-1] for f in flops]

    def objective(self, performer: Performer) -> Objective:
        """What the allocator maximises."""
        options = self.run.allocator
        return Objective(options.objective, tuple(self.run.ladder), tuple(self.rung_cost(performer)), options.target)

    @property
    def network(self) -> type[LookNetwork]:
        """The network of the allocator's form; forms that have none of their own learn values."""
        return PolicyAllocator if self.run.allocator.form == "policy" else ValueAllocator

    def new_allocator(self, performer: Performer) -> LookNetwork:
        """An allocator that has learnt nothing yet."""
        options = self.run.allocator
        torch.manual_seed(self.run.grpo.seed)
        shape: dict[str, Any] = {
            "ladder": self.run.ladder,
            "look": options.look,
            "feature_dim": self.bank.dim,
            "width": options.width,
            "dropout": options.dropout,
        }
        policy = self.network is PolicyAllocator
        config = PolicyConfig(options.price_range, **shape) if policy else AllocatorConfig(**shape)
        allocator = self.network(config)
        train = self.splits["train"]
        allocator.standardise(CheapLook(performer, config)(train[:: max(1, len(train) // 512)])[0])
        return allocator

    def _learner(self, performer: Performer, explore: float | None = None) -> AllocatorLearner:
        """A new allocator that learns online; `explore` takes the place of the recipe's."""
        options, allocator = self.run.allocator, self.new_allocator(performer)
        look, objective = CheapLook(performer, allocator.config), self.objective(performer)
        shared: dict[str, Any] = {
            "price": options.price,
            "explore": options.explore if explore is None else explore,
            "learning_rate": options.learning_rate,
        }
        if isinstance(allocator, PolicyAllocator):
            shared |= {"kind": options.advantage, "entropy": options.entropy, "decay": options.entropy_decay}
            return PolicyLearner(allocator, look, objective, **shared)
        return ValueLearner(allocator, look, objective, **shared, temperature=options.temperature)

    def _sft(self, stage: Stage, performer: Performer, parts: dict[str, Any]) -> Performer:
        """Train a stage, write its folder and read it again."""
        run, folder = self.run, self.run.folder / stage.name
        train, val = self.all_splits["train"], self.splits["val"]
        shared = Supervision(train, val, run.questions, run.ladder, run.performer, run.grpo.seed)
        resumed = last_whole(folder)
        clock = Clock(resumed)
        trainer, record = shared.run(stage, performer, folder, [MarkWhole(clock)], resumed)
        self._finish(folder, parts, performer, trained(trainer), clock, **record)
        return self._load(stage.name)

    def _finish(
        self,
        folder: Path,
        parts: dict[str, Any],
        performer: Performer,
        done: dict[str, Any],
        clock: Clock,
        allocator: Any = None,
        **record: Any,
    ) -> None:
        state = PartialState()
        if state.is_main_process:
            performer.save(folder)
            if allocator is not None:
                allocator.save_pretrained(folder / "allocator")
            mark_done(folder, parts, **done, **record, seconds=clock.seconds)
        state.wait_for_everyone()

    def _load(self, name: str) -> Performer:
        return self._placed(load_performer(self.run.folder / name, self.run.performer, self.bank))

    def _placed(self, performer: Performer) -> Performer:
        performer.model.to(PartialState().device)
        return performer

    def _sft_parts(self, count: int) -> dict[str, Any]:
        """What the first `count` stages of `sft` depend on."""
        run = self.run
        return {
            "cases": run.cases,
            "questions": run.questions,
            "encoder": run.encoder.identity(),
            "performer": dataclasses.asdict(run.performer),
            "ladder": run.ladder,
            "sft": [dataclasses.asdict(stage) for stage in run.sft[:count]],
            "balance": run.balance,
            "seed": run.grpo.seed,
            **({"form": "text"} if run.allocator.form == "text" else {}),
            **({"missing_slides": sorted(self.bank.missing)} if self.bank.missing else {}),
        }

    def grpo_parts(self) -> dict[str, Any]:
        left_out = {*NEUTRAL, *MODE_ALONE[self.run.grpo.mode]}
        grpo = {k: v for k, v in self.run.grpo.to_dict().items() if k not in left_out}
        grpo |= LOGGED
        online = self.run.allocator.settings()
        online = {k: v for k, v in online.items() if not k.startswith("fit_") and k not in AFTER}
        if self.run.allocator.form == "policy":
            online["form"] = "policy"  # of another network; the others learn values in the joint step
        if self.run.allocator.form == "text" and self.run.grpo.mode == "sequential":
            online = {}  # its adapter comes after, and no network learns
        return {
            **self._sft_parts(len(self.run.sft)),
            "rewards": [_scoring(r) for r in self.run.rewards],
            "grpo": grpo,
            "allocator": online,
        }


def trained(trainer: Any) -> dict[str, Any]:
    """What is recorded of a trainer's work."""
    state = trainer.state
    return {"steps": state.global_step, "flops": state.total_flos, "log": state.log_history}


def _scoring(reward: Any) -> Any:
    """An entry of `rewards` without the keys that change how it runs but not what it gives."""
    return {k: v for k, v in reward.items() if k not in ("workers", "timeout")} if isinstance(reward, dict) else reward
