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
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import (
    RepeatSampler,
    pad,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from envs.case import Case
from models.performer import Performer
from rewards.registry import gold_completion
from rl.allocation import AllocatorLearner
from rl.packing import by_length, pack
from slides.errors import InputError


@dataclass
class FrugalConfig(GRPOConfig):
    """`GRPOConfig` with the budgets of the joint step.

    Args:
        budgets_per_image: M, budgets drawn for each image in a joint step; each gets `num_generations` completions.
        shared_prefix: log-probabilities from one packed row for a prompt and its G completions.
        prefill_once: generation reads each prompt once and expands its cache to the G completions.
        gold_rollout: the last of the G completions is the gold answer and not a sample (mixed-policy GRPO: Yan et al.
            2025, LUFFY, section 3), so that a group of wrong answers still learns what is right. Rewards in the log
            count it; the allocator's score does not.
        disable_dropout: as in TRL, but on: with it the rollouts come from the policy that is updated.
    """

    budgets_per_image: int = field(default=4, metadata={"help": "budgets (M) drawn for each image in a joint step"})
    shared_prefix: bool = field(default=True, metadata={"help": "one packed row for a prompt and its G completions"})
    prefill_once: bool = field(default=True, metadata={"help": "generation reads each prompt once, not G times"})
    gold_rollout: bool = field(default=False, metadata={"help": "the last of the G completions is the gold answer"})
    disable_dropout: bool = field(default=True, metadata={"help": "no dropout in rollouts and updates"})

    def __post_init__(self) -> None:
        # Otherwise several processes without an accelerator would not know of each other.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
        block = self.budgets_per_image * self.num_generations
        local = self.per_device_train_batch_size * self.steps_per_generation
        if local % block:
            raise ValueError(
                f"per_device_train_batch_size x steps_per_generation = {local} completions a process, but an image "
                f"takes budgets_per_image x num_generations = {self.budgets_per_image} x {self.num_generations} = "
                f"{block}; make the first a multiple of {block}"
            )


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
        self._buffered_inputs: list[dict[str, Any]] | None
        super().__init__(*args, **kwargs)
        if self.args.gold_rollout:
            self._check_gold()
        self.score_weights = torch.tensor(score_weights, dtype=torch.float32)

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
        if self.args.gold_rollout:
            self._gold = [self._gold_ids(self.cases[row["index"]]) for row in inputs[:: self.num_generations]]
        rows = []
        for row, rung in zip(inputs, rungs, strict=True):
            case, budget = self.cases[row["index"]], self.learner.ladder[rung]
            seen = self.performer.see(case, budget)
            extra = {"budget": budget, "tokens": sum(map(len, seen)), "max_budget": self.learner.ladder[-1]}
            rows.append({**row, **extra, "prompt": self.performer.messages(case, seen)})
        output = super()._generate_and_score_completions(rows)
        passes = sum(key in output for key in ("old_per_token_logps", "ref_per_token_logps"))
        tokens = self._tokens(output, self.args.prefill_once) + passes * self._tokens(output)
        self._flops += 2 * self._parameters * tokens
        return output

    def _tokens(self, batch: dict[str, torch.Tensor], shared: bool | None = None) -> int:
        """Tokens of a pass over the batch: prompts counted once a group where they are shared."""
        shared = self.args.shared_prefix if shared is None else shared
        prompts = int(batch["prompt_mask"].sum())
        return int(batch["completion_mask"].sum()) + (prompts // self.num_generations if shared else prompts)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # TRL shuffles rows here before it splits them into micro-batches; whole groups keep a prompt together.
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            batch = shuffle_groups(batch, self.num_generations)
            parts = split_tensor_dict(batch, self.args.steps_per_generation)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        self._flops += 6 * self._parameters * self._tokens(inputs)
        return inputs

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **visual: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        group, count = self.num_generations, len(input_ids)
        if not self.args.shared_prefix or not self.model.training or count % group:
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **visual,
            )
        start = input_ids.shape[1] - logits_to_keep
        prompts = [input_ids[g, :start][attention_mask[g, :start].bool()] for g in range(0, count, group)]
        completions, valid = input_ids[:, start:], attention_mask[:, start:].bool()
        images = _by_sample(visual.get("pixel_values"), visual.get("image_grid_thw"), visual.get("num_images"), count)
        logps = torch.zeros(completions.shape, device=input_ids.device)
        entropies = torch.zeros_like(logps)
        lengths = [len(p) + int(valid[g * group : (g + 1) * group].sum()) + group for g, p in enumerate(prompts)]
        cap = max(1, (batch_size or count) // group)
        for chunk in by_length(lengths, cap=cap):
            rows = torch.cat([torch.arange(g * group, (g + 1) * group) for g in chunk]).to(input_ids.device)
            packed = pack([prompts[g] for g in chunk], completions[rows], valid[rows], self._tokenizer.pad_token_id)
            seen = [images[g * group] for g in chunk if images[g * group] is not None]
            with self.accelerator.autocast():
                out = model(
                    input_ids=packed.input_ids,
                    attention_mask=packed.mask,
                    position_ids=packed.position_ids,
                    pixel_values=torch.cat(seen) if seen else None,
                    labels=packed.labels,
                    fused_lm_head=True,
                )
            shape = (len(rows), logits_to_keep)
            logps = logps.index_copy(0, rows, packed.scatter(out.log_probs, *shape).to(logps.dtype))
            if compute_entropy:
                entropies = entropies.index_copy(0, rows, packed.scatter(out.entropy, *shape).to(logps.dtype))
        return logps, entropies if compute_entropy else None, None

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: Any,
        multimodal_fields: dict,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list, Any]:
        training = self.model.training
        group = num_generations
        if self.use_vllm or not self.args.prefill_once or not training or len(prompt_ids) % group:
            completions, logps = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        else:
            completions, logps = self._generate_groups(prompt_ids, images, multimodal_fields, group), None
        if self.args.gold_rollout and training:
            completions[group - 1 :: group] = self._gold
        return completions, logps

    def _check_gold(self) -> None:
        """Refuse gold answers that would be cut off, before anything is trained."""
        limit = self.args.max_completion_length
        lengths = {case.id: len(self._gold_ids(case)) for case in self.cases}
        longest = max(lengths, key=lengths.__getitem__)
        if limit and lengths[longest] > limit:
            raise InputError(
                f"max_completion_length: {limit} tokens, but the gold answer of case {longest} takes "
                f"{lengths[longest]}; raise it to at least that, or set gold_rollout to false"
            )

    def _gold_ids(self, case: Case) -> list[int]:
        text = gold_completion({"answer": case.answer}) + self._tokenizer.eos_token
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _generate_groups(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict, group: int
    ) -> list[list[int]]:
        """Completions of prompts that come in groups of equal ones; a group's prompt is read once."""
        sampled = group - 1 if self.args.gold_rollout else group
        first = list(range(0, len(prompt_ids), group))
        counts = [len(i) if i else 0 for i in images] if images is not None else None
        patches = _by_sample(
            multimodal_fields.get("pixel_values"), multimodal_fields.get("image_grid_thw"), counts, len(prompt_ids)
        )
        completions: list[list[int]] = [[]] * len(prompt_ids)
        device = self.accelerator.device
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator, generation_kwargs=self.generation_kwargs
            ) as model,
            torch.no_grad(),
        ):
            model.eval()  # dropout, where the recipe keeps it, is for the update
            for chunk in by_length([len(prompt_ids[i]) for i in first]):
                rows = [first[c] for c in chunk]
                text = [torch.tensor(prompt_ids[i]) for i in rows]
                ids = pad(text, padding_value=self._tokenizer.pad_token_id, padding_side="left").to(device)
                mask = pad([torch.ones_like(t) for t in text], padding_value=0, padding_side="left").to(device)
                seen = [patches[i] for i in rows if patches[i] is not None]
                prefill = model(
                    input_ids=ids[:, :-1],
                    attention_mask=mask[:, :-1],
                    position_ids=(mask[:, :-1].cumsum(1) - 1).clamp_min(0),
                    pixel_values=torch.cat(seen).to(device) if seen else None,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = prefill.past_key_values
                cache.batch_repeat_interleave(sampled)
                out = model.generate(
                    input_ids=ids.repeat_interleave(sampled, 0),
                    attention_mask=mask.repeat_interleave(sampled, 0),
                    past_key_values=cache,
                    generation_config=self.generation_config,
                )[:, ids.shape[1] :].tolist()
                for at, row in enumerate(rows):
                    for k in range(sampled):
                        tokens = out[at * sampled + k]
                        ends = [j + 1 for j, t in enumerate(tokens) if t in self.eos_token_ids]
                        completions[row + k] = tokens[: ends[0]] if ends else tokens
            model.train()
        return completions

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
            score = score.view(*self._drawn.rungs.shape, self.num_generations)
            score = score[..., : self.num_generations - self.args.gold_rollout].mean(-1)
            # Every process updates on the rollouts of all, so that the allocators stay equal without DDP.
            drawn = [
                gather(t.to(local.device)) for t in (self._drawn.look, self._question(), self._drawn.rungs, score)
            ]
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


def shuffle_groups(batch: dict[str, Any], group: int) -> dict[str, Any]:
    """Permute whole groups of `group` rows in every per-row entry of a batch."""
    count = len(batch["completion_ids"])
    order = torch.randperm(count // group)[:, None] * group + torch.arange(group)
    index = order.flatten().tolist()

    def permute(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
            return value[index]
        if isinstance(value, list) and len(value) == count:
            return [value[i] for i in index]
        return value

    return {key: permute(value) for key, value in batch.items()}


def _by_sample(
    pixel_values: torch.Tensor | None, grid: torch.Tensor | None, counts: Sequence[int] | None, rows: int
) -> list[torch.Tensor | None]:
    """Visual rows of each of the samples, None for a sample without images."""
    if pixel_values is None or grid is None or counts is None:
        return [None] * rows
    images = iter(pixel_values.split(grid.prod(-1).tolist()))
    return [torch.cat([next(images) for _ in range(n)]) if n else None for n in counts]
