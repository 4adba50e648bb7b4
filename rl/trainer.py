"""The overrides of TRL's GRPOTrainer: budgets drawn by the allocator, two policies from one set of rollouts.

Every image is drawn with M budgets and G completions each. A block of G rows shares image and budget and is TRL's
advantage group; the allocator learns from the block's mean score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from envs.case import Case
from models.performer import Performer
from rl.allocation import AllocatorLearner
from slides.errors import InputError


@dataclass
class FrugalConfig(GRPOConfig):
    """`GRPOConfig` with the budgets of the joint step.

    Args:
        budgets_per_image: M, budgets drawn for each image in a joint step; each gets `num_generations` completions.
    """

    budgets_per_image: int = field(default=4, metadata={"help": "budgets (M) drawn for each image in a joint step"})


class FrugalTrainer(GRPOTrainer):
    """GRPO of performer and allocator.

    Args:
        performer: what sees and answers; its model is trained.
        cases: the training cases, by the `index` column of the training set.
        learner: the allocator with its optimizer.
        score_weights: weight of each reward in the score that the allocator learns from (0 for shaping rewards).
    """

    def __init__(
        self,
        *args: Any,
        performer: Performer,
        cases: Sequence[Case],
        learner: AllocatorLearner,
        score_weights: Sequence[float],
        **kwargs: Any,
    ):
        self.performer, self.cases, self.learner = performer, cases, learner
        self._parameters = performer.model.num_parameters(exclude_embeddings=True)
        self._flops = 0
        super().__init__(*args, **kwargs)
        self.score_weights = torch.tensor(score_weights, dtype=torch.float32)
        block = self.args.budgets_per_image * self.num_generations
        local = self.args.per_device_train_batch_size * self.args.steps_per_generation
        if local % block:
            raise InputError(
                f"per_device_train_batch_size x steps_per_generation = {local} completions a process, but an image takes "
                f"budgets_per_image x num_generations = {self.args.budgets_per_image} x {self.num_generations} = {block}; "
                f"make the first a multiple of {block}"
            )

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        block = self.args.budgets_per_image * self.num_generations
        return RepeatSampler(
            dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=block,
            batch_size=self.args.generation_batch_size // block,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            block = self.args.budgets_per_image * self.num_generations
            cases = [self.cases[row["index"]] for row in inputs[::block]]
            self._drawn = self.learner.draw(cases, self.args.budgets_per_image)
            rungs = self._drawn.rungs.flatten().repeat_interleave(self.num_generations).tolist()
        else:
            rungs = [len(self.learner.ladder) - 1] * len(inputs)
        rows = []
        for row, rung in zip(inputs, rungs, strict=True):
            case, budget = self.cases[row["index"]], self.learner.ladder[rung]
            seen = self.performer.see(case, budget)
            extra = {"budget": budget, "tokens": sum(map(len, seen)), "max_budget": self.learner.ladder[-1]}
            rows.append({**row, **extra, "prompt": self.performer.messages(case, seen)})
        output = super()._generate_and_score_completions(rows)
        self._flops += 2 * self._parameters * _tokens(output)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self._flops += 6 * self._parameters * _tokens(inputs)
        return inputs

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOPs since the last call: 2 a parameter and token in generation, 6 in the update, padding not counted."""
        flops, self._flops = self._flops, 0
        return flops

    def _calculate_rewards(self, inputs: list[dict], *rest: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, *rest)
        if self.model.training:
            local = rewards[len(inputs) * self.accelerator.process_index :][: len(inputs)]
            weights = self.score_weights.to(local.device) * ~local.isnan()
            score = (local.nan_to_num() * weights).sum(1) / weights.sum(1).clamp_min(1e-9)
            score = score.view(*self._drawn.rungs.shape, self.num_generations).mean(-1)
            # Every process updates on the rollouts of all, so that the allocators stay equal without DDP.
            drawn = [gather(t.to(local.device)) for t in (self._drawn.look, self._question(), self._drawn.rungs, score)]
            for name, value in self.learner.update(*(t.cpu() for t in drawn)).items():
                self._metrics["train"][f"allocator/{name}"].append(value)
        return rewards

    def _question(self) -> torch.Tensor:
        return self.accelerator.pad_across_processes(self._drawn.question.to(self.accelerator.device), dim=1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.learner.save(f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.learner.load(resume_from_checkpoint)


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    return int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
