"""GRPO of two policies from one set of rollouts: the performer and the allocator of its budgets.

Every image is drawn with M budgets and G completions each. The G rows that share image and budget are TRL's advantage
group; the allocator learns from the group's mean score. In the mode `alternating` the two take turns, each with
rollouts of its own; in `sequential` the allocator only draws here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather

from frugalpath.allocator.online import AllocatorLearner
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.performer import Performer
from frugalpath.models.vision_adapter import Prompt
from frugalpath.rewards.registry import RewardFunction
from frugalpath.rl.rollout import Rollout
from frugalpath.rl.trainer import GroupTrainer
from frugalpath.sft.supervised import gold_ids


class FrugalTrainer(GroupTrainer):
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
        self._turn: tuple[bool, bool] | None = None
        super().__init__(*args, **kwargs)
        if self.args.gold_rollout:
            self._check_gold()
        self.score_weights = torch.tensor(score_weights, dtype=torch.float32)

    def _check_vllm(self, model: Any, processor: Any, mode: str) -> None:
        super()._check_vllm(model, processor, mode)
        # Tokens grow with the budget.
        for budget in (self.learner.ladder[0], self.learner.ladder[-1]):
            for case in self.cases:
                self.performer.processor.sight.check_stock(self.performer.see(case, budget))

    def _learns(self) -> tuple[bool, bool]:
        """Whether the performer and the allocator learn in this step."""
        if self.args.mode == "alternating":
            performers = self.state.global_step // self.args.alternate_every % 2 == 0
            return performers, not performers
        return True, self.args.mode == "joint"

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        turn = self._learns()
        if turn != self._turn:
            self._turn, self._buffered_inputs = turn, None  # each learns from its own rollouts
        performer_learns, _ = turn
        if performer_learns:
            return super().training_step(model, inputs, num_items_in_batch)
        # The allocator learns while rollouts are scored. The performer gets no gradient, so that its optimizer stays.
        model.train()
        self._without_loss = not self._corrected
        try:
            self._prepare_inputs(inputs)
        finally:
            self._without_loss = False
        self._step += 1
        return torch.zeros((), device=self.accelerator.device)

    @property
    def _copies(self) -> int:
        return self.args.budgets_per_image * self.num_generations

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        group = self.num_generations if self.model.training else self.num_generations_eval
        first = inputs[::group]
        if self.model.training:
            cases = [self.cases[row["index"]] for row in inputs[:: self.args.budgets_per_image * group]]
            self._drawn = self.learner.draw(cases, self.args.budgets_per_image)
            rungs = self._drawn.rungs.flatten().tolist()
        else:
            rungs = [len(self.learner.ladder) - 1] * len(first)
        rows: list[dict[str, Any]] = []
        prompts: list[Prompt] = []
        for at, (row, rung) in enumerate(zip(first, rungs, strict=True)):
            case, budget = self.cases[row["index"]], self.learner.ladder[rung]
            prompt = self.performer.prompt(case, budget)
            prompts.append(prompt)
            extra = {"budget": budget, "tokens": prompt.visual, "max_budget": self.learner.ladder[-1]}
            shared = {"prompt": self.performer.messages(case, prompt.views), "views": prompt.views, **extra}
            rows += [{**member, **shared} for member in inputs[at * group : (at + 1) * group]]
        self._batch = Rollout(prompts, [at for at in range(len(first)) for _ in range(group)])
        return super()._generate_and_score_completions(rows)

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        # The performer has read them, each case and budget once in the run.
        return self._batch.ids(), None, {}

    def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> tuple[list, Any]:
        if not (self.args.gold_rollout and self.model.training):
            return super()._generate_single_turn(prompt_ids, *rest)
        group = self.num_generations
        gold = [gold_ids(self._tokenizer, self.cases[row["index"]]) for row in self._batch.inputs[::group]]
        if self._prefills_once:
            written = self._generate_once([group - 1] * len(self._batch.prompts))
            return [w for i, g in enumerate(gold) for w in (*written[i * (group - 1) :][: group - 1], g)], None
        completions, logps = super()._generate_single_turn(prompt_ids, *rest)
        completions[group - 1 :: group] = gold
        return completions, logps

    def _check_gold(self) -> None:
        """Refuse gold answers that would be cut off, before anything is trained."""
        limit = self.args.max_completion_length
        lengths = {case.id: len(gold_ids(self._tokenizer, case)) for case in self.cases}
        longest = max(lengths, key=lengths.__getitem__)
        if limit and lengths[longest] > limit:
            raise InputError(
                f"max_completion_length: {limit} tokens, but the gold answer of case {longest} takes "
                f"{lengths[longest]}; raise it to at least that, or set gold_rollout to false"
            )

    def _calculate_rewards(self, inputs: list[dict], *rest: Any) -> torch.Tensor:
        before = self._errors()
        rewards = super()._calculate_rewards(inputs, *rest)
        _, allocator_learns = self._learns()
        if self.model.training and allocator_learns:
            local = rewards[len(inputs) * self.accelerator.process_index :][: len(inputs)]
            weights = self.score_weights.to(local.device) * ~local.isnan()
            # A completion that no reward scores has none, and so has a draw whose completions have none.
            score = (local.nan_to_num() * weights).sum(1) / weights.sum(1)
            score = score.view(*self._drawn.rungs.shape, self.num_generations)
            score = score[..., : self.num_generations - self.args.gold_rollout].nanmean(-1)
            # Every process updates on the rollouts of all, so that the allocators stay equal without DDP.
            seen = (self._padded(self._drawn.look), self._padded(self._drawn.question))
            parts = (*seen, self._drawn.rungs, score, self._drawn.price)
            look, question, rungs, score, price = (gather(t.to(local.device)).cpu() for t in parts)
            if score.isnan().all():
                self._check_failed(self._errors() - before)
            metrics = self.learner.update(look, question, rungs, score, price, self.state.epoch or 0.0)
            for name, value in metrics.items():
                self._metrics["train"][f"allocator/{name}"].append(value)
        return rewards

    def _errors(self) -> int:
        """Errors so far of the rewards of the score, where they may fail (`on_error: none`)."""
        scoring = [r for r, weight in zip(self.reward_funcs, self.score_weights.tolist(), strict=True) if weight]
        return sum(r.counts["errors"] for r in scoring if isinstance(r, RewardFunction))

    def _check_failed(self, errors: int) -> None:
        """Refuse a batch without any score, unless a reward failed on it.

        Raises:
            InputError: as `Scorer` has it.
        """
        if gather(torch.tensor([errors], device=self.accelerator.device)).sum():
            return
        case = self.cases[self._batch.inputs[0]["index"]]
        weighed = zip(self.reward_func_names, self.score_weights.tolist(), strict=True)
        names = ", ".join(name for name, weight in weighed if weight)
        raise InputError(
            f"case {case.id}: no reward scores its task {case.task!r}, or that of another case of the batch (asked: "
            f"{names}); add one that does to `rewards`"
        )

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        return self.accelerator.pad_across_processes(rows.to(self.accelerator.device), dim=1)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self.learner.save(f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # The one step of resuming that all launchers share; DeepSpeed reads the model itself.
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.learner.load(checkpoint)
