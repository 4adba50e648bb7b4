"""Prompts and rollouts of GRPO, each prompt made, shown and prefilled once for all its completions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from frugalpath.models.attention import share_prefix
from frugalpath.models.build import make_vision_adapter
from frugalpath.models.cost import FlopCount
from frugalpath.models.feature_cache import FeatureCache
from frugalpath.models.generation import generate
from frugalpath.models.modes import evaluating
from frugalpath.models.processor import ViewProcessor, token_types
from frugalpath.models.sharded import gathered, make_ready, shares_out
from frugalpath.models.vision_adapter import Prompt, read_prompt
from frugalpath.recipe.checkpoints import SaveBetweenRollouts
from frugalpath.rl.batches import EpochSampler, LoadedOnce, ShownOnce
from frugalpath.rl.completion_log import CompletionLog
from frugalpath.rl.packing import groups_of
from frugalpath.rl.rollout import Rollout
from frugalpath.rl.vllm_rollouts import VLLMRollouts, require_servable, require_vllm


class RolloutTrainer(CompletionLog):
    """`GRPOTrainer` whose rollouts read each prompt once; its update is TRL's.

    Args:
        args: TRL's own, with `args` a `GroupConfig`, whose switches turn the shortcuts off one by one.
    """

    vllm_generation: Any

    def __init__(self, *args: Any, **kwargs: Any):
        asked = inspect.signature(GRPOTrainer).bind_partial(*args, **kwargs).arguments
        if getattr(asked.get("args"), "use_vllm", False):
            self._check_vllm(asked["model"], asked.get("processing_class"), asked["args"].vllm_mode)
        super().__init__(*args, **kwargs)
        if self.tools or self.rollout_func is not None or self.environment_factories is not None:
            raise ValueError("tools, environments and rollout_func make prompts of their own; use TRL's GRPOTrainer")
        if self._dist.fsdp_version == 1 or not self.args.ds3_gather_for_generation:
            # Weights are then gathered in every forward, of which processes may need different numbers.
            self.args.prefill_once = False
        own = self.accelerator.unwrap_model(self.model)
        make_ready(own)
        self.sight = make_vision_adapter(own, self.processing_class)
        self.sight.keep_tower(own, self.accelerator.device if shares_out(self.accelerator) else None)
        self.sight.configure(own, self.args.see_once, _vision_cache(self.args), self.accelerator.autocast)
        if self.use_vllm:
            self.vllm_generation = VLLMRollouts(self.vllm_generation, self.sight)
        elif self.sight.image_token_id is not None:
            _ban(self, self.sight.image_token_id)
        if self.args.shared_prefix:
            for model in (own, self.ref_model):
                if model is not None:
                    self._attention = share_prefix(model, self.args.flex_attention)
        if self.args.prefetch_images and self.args.dataloader_num_workers == 0:
            self.data_collator = self._prefetch
        self._flops = FlopCount(own)
        self._batch = Rollout()
        self._shown = ShownOnce(self.sight)
        self._without_loss = False
        """Whether rollouts are made for something else than the performer's update, which needs no pass over them."""
        self._buffered_inputs: list[dict[str, Any]] | None
        used_for = self.args.steps_per_generation * self.num_iterations
        self.add_callback(SaveBetweenRollouts(lambda: self._step % used_for == 0))

    def _check_vllm(self, model: Any, processor: Any, mode: str) -> None:
        """Refuse what vLLM cannot write for, before it is started."""
        require_servable(model, processor.sight if isinstance(processor, ViewProcessor) else None, mode)
        require_vllm()

    @property
    def _prefills_once(self) -> bool:
        """Whether completions come from our own generation, which reads each prompt once."""
        return self.args.prefill_once and not self.use_vllm and not self.use_transformers_continuous_batching

    @property
    def _corrected(self) -> bool:
        """Whether old log-probabilities correct for those of vLLM."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def _copies(self) -> int:
        """Completions of a row of the training set."""
        return self.num_generations

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        return EpochSampler(
            dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=self._copies,
            batch_size=self.args.generation_batch_size // self._copies,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            trained=lambda: int(round(self.state.epoch or 0, 6)),
        )

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._get_dataloader(
            LoadedOnce(dataset) if hasattr(dataset, "__len__") else dataset, *args, **kwargs
        )

    def _prefetch(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Collator: the next batch's images are made ready while this one is trained on."""
        rows = self._shown(rows)
        self.sight.prefetch([v for row in rows for v in row["views"]])
        return rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        options = {**self.chat_template_kwargs}
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        read: list[Prompt] = []
        rows: list[int] = []
        for at, prompt in enumerate(prompts):
            # Equal and not identical: loaders and TRL copy prompts. Views are never copied.
            if not at or prompt != prompts[at - 1]:
                read.append(read_prompt(self.processing_class, self.sight, prompt, **options))
            rows.append(len(read) - 1)
        self._batch.prompts, self._batch.rows = read, rows
        return self._batch.ids(), None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._batch
        batch.inputs = inputs if "views" in inputs[0] else self._shown(inputs)
        left_out = ("views", "image", "images")
        every = self.args.steps_per_generation * self.num_iterations
        aligned = every % self.args.gradient_accumulation_steps == 0 and self.args.disable_dropout
        # Where one batch serves several optimizer steps, the first is on-policy: its own pass has the old
        # log-probabilities of its rows. With a single step for a batch TRL needs none.
        deferred = batch.defer_old = (
            self.args.reuse_old_logps
            and self.model.training
            and aligned
            and not self._corrected
            and self.args.gradient_accumulation_steps % every != 0
        )
        output = super()._generate_and_score_completions(
            [{k: v for k, v in row.items() if k not in left_out} for row in batch.inputs]
        )
        if deferred:
            del output["old_per_token_logps"]
        return {**output, "prompt_index": torch.tensor(batch.rows, device=output["prompt_ids"].device)}

    def _calculate_rewards(self, inputs: list[dict], *rest: Any) -> torch.Tensor:
        # Rewards may ask for any column, the images among them.
        return super()._calculate_rewards(
            [{k: v for k, v in r.items() if k != "views"} for r in self._batch.inputs], *rest
        )

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: Any,
        multimodal_fields: dict,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list, Any]:
        batch = self._batch
        if self._prefills_once:
            return self._generate_once([len(g) for g in groups_of(batch.rows)]), None
        fields: dict[str, Any] = {}
        if self.use_vllm:
            self.sight.check_stock([v for p in batch.prompts for v in p.views])
            shown = [[v.image() for v in p.views] or None for p in batch.prompts]
            images = [shown[i] for i in batch.rows] if any(shown) else None
        else:
            fields = batch.fields(self.sight)
            fields.pop("num_images", None)
            if self.sight.typed_tokens:
                fields["mm_token_type_ids"] = token_types(prompt_ids, self.sight.image_token_id)
        return super()._generate_single_turn(prompt_ids, images, fields, num_generations, has_tool_images)

    def _generate_once(self, copies: Sequence[int]) -> list[list[int]]:
        """Completions, `copies[i]` of the i-th prompt."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            gathered(model),
        ):
            training = model.training
            with evaluating(model):  # dropout, where it is kept, is for the update
                out = generate(model, self.sight, self._batch.prompts, copies, self.generation_config)
        if training:
            self._flops.add(sum(map(len, self._batch.prompts)) + sum(map(len, out)))
        return out

    def _count(self, tokens: int) -> None:
        """Add a pass to the FLOPs of training."""
        if self.model.training:
            self._flops.add(tokens, update=torch.is_grad_enabled())

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOPs of the language model since the last call, see `FlopCount`."""
        return self._flops.take()


def _ban(trainer: GRPOTrainer, token: int) -> None:
    """Keep a token out of completions: a written image token has no image.

    TRL bans it unless the caller's `generation_kwargs` ban others.
    """
    banned = sorted({*(trainer.generation_config.suppress_tokens or []), token})
    trainer.generation_config.suppress_tokens = trainer.generation_kwargs["suppress_tokens"] = banned


def _vision_cache(args: Any) -> FeatureCache | None:
    if args.vision_cache is None:
        return None
    dtype = getattr(torch, args.vision_cache_dtype) if args.vision_cache_dtype else None
    return FeatureCache(args.vision_cache, args.vision_cache_gb, dtype)
