"""GRPO that does each piece of work once: the overrides of TRL's GRPOTrainer.

`GroupTrainer` takes the place of `GRPOTrainer` for Qwen2.5-VL, slide_vlm and text models, with the same arguments and
the same results.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_tensor_dict

from frugalpath.models.attention import check_window, share_prefix
from frugalpath.models.build import make_sight
from frugalpath.models.cost import FlopCount
from frugalpath.models.feature_cache import FeatureCache
from frugalpath.models.generation import by_length, generate, to_device
from frugalpath.models.modes import evaluating
from frugalpath.models.processor import ViewProcessor, token_types
from frugalpath.models.sharded import gathered, make_ready, shares_out
from frugalpath.models.vision_adapter import Prompt, read_prompt
from frugalpath.recipe.checkpoints import SaveBetweenRollouts
from frugalpath.rl.batches import EpochSampler, LoadedOnce, ShownOnce, share, shuffle_groups, split_silent, take
from frugalpath.rl.completion_log import CompletionLog
from frugalpath.rl.packing import groups_of, pack, packed_mask, runs_of
from frugalpath.rl.vllm_rollouts import VLLMRollouts, require_servable, require_vllm


class GroupTrainer(CompletionLog):
    """`GRPOTrainer` that reads, sees and prefills each prompt once for all its completions.

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
        self.sight = make_sight(own, self.processing_class)
        self.sight.keep_tower(own, self.accelerator.device if shares_out(self.accelerator) else None)
        self.sight.configure(own, self.args.see_once, self._vision_cache(), self.accelerator.autocast)
        if self.use_vllm:
            self.vllm_generation = VLLMRollouts(self.vllm_generation, self.sight)
        elif self.sight.image_token_id is not None:
            self._ban(self.sight.image_token_id)
        if self.args.shared_prefix:
            for model in (own, self.ref_model):
                if model is not None:
                    self._attention = share_prefix(model, self.args.flex_attention)
        if self.args.prefetch_images and self.args.dataloader_num_workers == 0:
            self.data_collator = self._prefetch
        self._flops = FlopCount(own)
        self._prompts: list[Prompt] = []
        self._rows: list[int] = []
        self._inputs: list[dict[str, Any]] = []
        self._shown = ShownOnce(self.sight)
        self._defer_old = self._without_loss = False
        self._fresh = torch.zeros(0)
        """Log-probabilities of the last pass."""
        self._buffered_inputs: list[dict[str, Any]] | None
        used_for = self.args.steps_per_generation * self.num_iterations
        self.add_callback(SaveBetweenRollouts(lambda: self._step % used_for == 0))

    def _check_vllm(self, model: Any, processor: Any, mode: str) -> None:
        """Refuse what vLLM cannot write for, before it is started."""
        require_servable(model, processor.sight if isinstance(processor, ViewProcessor) else None, mode)
        require_vllm()

    def _ban(self, token: int) -> None:
        """Keep a token out of completions: a written image token has no image.

        TRL bans it unless the caller's `generation_kwargs` ban others.
        """
        banned = sorted({*(self.generation_config.suppress_tokens or []), token})
        self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = banned

    @property
    def _prefills_once(self) -> bool:
        """Whether completions come from our own generation, which reads each prompt once."""
        return self.args.prefill_once and not self.use_vllm and not self.use_transformers_continuous_batching

    @property
    def _corrected(self) -> bool:
        """Whether old log-probabilities correct for those of vLLM."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    def _vision_cache(self) -> FeatureCache | None:
        if self.args.vision_cache is None:
            return None
        kept = self.args.vision_cache_dtype
        dtype = getattr(torch, kept) if kept else None
        return FeatureCache(self.args.vision_cache, self.args.vision_cache_gb, dtype)

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

    # Prompts: made once for all rows that share them.

    def _prefetch(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Collator: the next batch's images are made ready while this one is trained on."""
        rows = self._shown(rows)
        self.sight.prefetch([v for row in rows for v in row["views"]])
        return rows

    def _tokenize_prompts(self, prompts: list) -> tuple[list, None, dict]:
        options = {**self.chat_template_kwargs}
        if self.chat_template is not None:
            options["chat_template"] = self.chat_template
        self._prompts, self._rows = [], []
        for at, prompt in enumerate(prompts):
            # Equal and not identical: loaders and TRL copy prompts. Views are never copied.
            if not at or prompt != prompts[at - 1]:
                self._prompts.append(read_prompt(self.processing_class, self.sight, prompt, **options))
            self._rows.append(len(self._prompts) - 1)
        ids = [p.ids.tolist() for p in self._prompts]
        return [ids[i] for i in self._rows], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._inputs = inputs if "views" in inputs[0] else self._shown(inputs)
        left_out = ("views", "image", "images")
        every = self.args.steps_per_generation * self.num_iterations
        aligned = every % self.args.gradient_accumulation_steps == 0 and self.args.disable_dropout
        self._defer_old = (
            self.args.reuse_old_logps
            and self.model.training
            and aligned
            and not self._corrected
            and self.args.gradient_accumulation_steps % every != 0
        )
        deferred = self._defer_old
        output = super()._generate_and_score_completions(
            [{k: v for k, v in row.items() if k not in left_out} for row in self._inputs]
        )
        if deferred:
            del output["old_per_token_logps"]
        return {**output, "prompt_index": torch.tensor(self._rows, device=output["prompt_ids"].device)}

    def _calculate_rewards(self, inputs: list[dict], *rest: Any) -> torch.Tensor:
        # Rewards may ask for any column, the images among them.
        return super()._calculate_rewards([{k: v for k, v in r.items() if k != "views"} for r in self._inputs], *rest)

    # Rollouts: each prompt is prefilled once.

    def _generate_single_turn(
        self,
        prompt_ids: list,
        images: Any,
        multimodal_fields: dict,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list, Any]:
        if self._prefills_once:
            return self._generate_once([len(g) for g in groups_of(self._rows)]), None
        fields: dict[str, Any] = {}
        if self.use_vllm:
            self.sight.check_stock([v for p in self._prompts for v in p.views])
            shown = [[v.image() for v in p.views] or None for p in self._prompts]
            images = [shown[i] for i in self._rows] if any(shown) else None
        else:
            fields = self._fields(self._rows)
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
                out = generate(model, self.sight, self._prompts, copies, self.generation_config)
        if training:
            self._flops.add(sum(map(len, self._prompts)) + sum(map(len, out)))
        return out

    def _fields(self, rows: Sequence[int]) -> dict[str, Any]:
        """Visual inputs of rows as TRL carries them, repeated for every row."""
        shown = [self._prompts[i].views for i in rows]
        fields = dict(self.sight.fields([v for views in shown for v in views]))
        return {**fields, "num_images": [len(v) for v in shown]} if fields else {}

    # The update: one packed row for a prompt.

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # TRL shuffles rows here before it splits them into micro-batches; whole groups keep a prompt together.
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = shuffle_groups(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = split_tensor_dict(batch, steps)
            if "old_per_token_logps" not in batch and self.args.gradient_accumulation_steps % steps != 0:
                # Only the first optimizer step is on-policy; its own pass gives its old log-probabilities.
                for part in self._buffered_inputs[self.args.gradient_accumulation_steps :]:
                    part["old_per_token_logps"] = self._old_logps(part)
        return self._buffered_inputs[self._step % steps]

    @torch.no_grad()
    def _old_logps(self, inputs: dict[str, Any]) -> torch.Tensor:
        self._rows = inputs["prompt_index"].tolist()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return self._get_per_token_logps_and_entropies(self.model, ids, mask, inputs["completion_ids"].shape[1])[0]

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
        start = input_ids.shape[1] - logits_to_keep
        completions, valid = input_ids[:, start:], attention_mask[:, start:].bool()
        if self._defer_old or self._without_loss:
            # The first pass after the rollouts is the old policy's; `_prepare_inputs` makes what is needed of it.
            self._defer_old = False
            return torch.zeros(completions.shape, device=input_ids.device), None, None
        if not self.args.shared_prefix or compute_aux_loss:
            fields = self._fields(self._rows)
            if fields and self.sight.typed_tokens:
                fields["mm_token_type_ids"] = token_types(input_ids, self.sight.image_token_id)
            self._count(int(attention_mask.sum()))
            stock = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **to_device(fields, input_ids.device),
            )
            self._fresh = stock[0].detach()
            return stock
        logps = torch.zeros(completions.shape, device=input_ids.device)
        entropies = torch.zeros_like(logps)
        check_window(model, max(map(len, self._prompts)) + logits_to_keep)
        for groups in self._forwards(valid.sum(1).tolist(), batch_size):
            rows = torch.tensor([row for g in groups for row in g], device=input_ids.device)
            local = iter(range(len(rows)))
            read = [self._prompts[self._rows[g[0]]] for g in groups]
            packed = pack(
                [p.ids for p in read],
                [p.positions for p in read],
                [[next(local) for _ in g] for g in groups],
                completions[rows],
                valid[rows],
                self._tokenizer.pad_token_id,
            )
            seen = self.sight.inputs(model, [p.views for p in read])
            with self.accelerator.autocast():
                out = model(
                    input_ids=packed.input_ids,
                    position_ids=packed.position_ids,
                    labels=packed.labels,
                    fused_lm_head=True,
                    **packed_mask(packed.segment, self._attention, self._dtype(), self._runs(packed.input_ids)),
                    **to_device(seen, input_ids.device),
                )
            shape = (len(rows), logits_to_keep)
            logps = logps.to(out.log_probs.dtype).index_copy(0, rows, packed.scatter(out.log_probs, *shape))
            if compute_entropy:
                entropies = entropies.to(out.entropy.dtype).index_copy(0, rows, packed.scatter(out.entropy, *shape))
        self._fresh = logps.detach()
        return logps, entropies if compute_entropy else None, None

    def _dtype(self) -> torch.dtype:
        """Of the queries in a forward."""
        device = self.accelerator.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    def _runs(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Image tokens of packed rows that see each other, where the family has such."""
        token = self.sight.image_token_id
        return runs_of(ids, token) if self.sight.bidirectional and token is not None else None

    def _packed_length(self, group: Sequence[int], prompts: Sequence[int], written: Sequence[int]) -> int:
        """Tokens of a group's packed row, from the prompt of every row and the length of its completion."""
        return len(self._prompts[prompts[group[0]]]) - 1 + sum(written[row] + 1 for row in group)

    def _forwards(self, written: Sequence[int], batch_size: int | None) -> list[list[list[int]]]:
        """Groups of rows for each forward over a batch, from the length of every row's completion."""
        if self.accelerator.num_processes > 1:
            # As many forwards on every process: each is a collective, of buffers or of sharded weights.
            size = batch_size or len(self._rows)
            parts = [range(len(self._rows))[at : at + size] for at in range(0, len(self._rows), size)]
            out = [[[part[row] for row in g] for g in groups_of([self._rows[row] for row in part])] for part in parts]
        else:
            groups = groups_of(self._rows)
            cap = None if batch_size is None else max(1, batch_size // max(map(len, groups)))
            lengths = [self._packed_length(g, self._rows, written) for g in groups]
            out = [[groups[g] for g in chunk] for chunk in by_length(lengths, cap=cap)]
        self._count(sum(self._packed_length(g, self._rows, written) for groups in out for g in groups))
        return out

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept = self._teaching(inputs)
        part = inputs if kept is None else {k: take(v, kept, len(inputs["prompt_ids"])) for k, v in inputs.items()}
        self._rows = part["prompt_index"].tolist()
        loss = super()._compute_loss(model, part)
        if self.num_iterations > 1 and self.model.training and "old_per_token_logps" not in inputs:
            old = torch.zeros_like(inputs["completion_ids"], dtype=self._fresh.dtype)
            inputs["old_per_token_logps"] = self._fresh if kept is None else old.index_copy(0, kept, self._fresh)
        return loss if kept is None else loss * share(self.loss_type, inputs, kept)

    def _teaching(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Rows of the groups with some advantage, None for all.

        At least one row stays, and as many on every process, as TRL gathers values of rows.
        """
        others = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        if others or self.beta != 0.0 or not self.args.skip_zero_advantage or not self.model.training:
            return None
        device, prompts = inputs["prompt_index"].device, inputs["prompt_index"].tolist()
        written = inputs["completion_mask"].sum(1).tolist()
        teaching, silent = split_silent(groups_of(prompts), inputs["advantages"])
        silent.sort(key=lambda g: self._packed_length(g, prompts, written))
        count = torch.tensor(max(1, len(teaching)), device=device)
        wanted = int(gather(count).max()) if self.accelerator.num_processes > 1 else int(count)
        kept = teaching + [row for g in silent for row in g][: wanted - len(teaching)]
        return None if len(kept) == len(prompts) else torch.tensor(sorted(kept), device=device)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, None, None]:
        prompts = self._prompts
        try:
            if not self.args.skip_eval_loss:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            self._without_loss = not self._corrected
            with torch.no_grad():
                self._prepare_inputs(inputs)
            return None, None, None
        finally:
            # Buffered training batches still hold indices of their prompts.
            self._prompts, self._without_loss = prompts, False

    def _count(self, tokens: int) -> None:
        """Add a pass to the FLOPs of training."""
        if self.model.training:
            self._flops.add(tokens, update=torch.is_grad_enabled())

    def floating_point_ops(self, inputs: Any) -> int:
        """FLOPs of the language model since the last call, see `FlopCount`."""
        return self._flops.take()
