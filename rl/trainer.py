"""GRPO that does each piece of work once: the update, one packed row for a prompt and all its completions.

`GroupTrainer` takes the place of `GRPOTrainer` for Qwen2.5-VL, slide_vlm and text models, with the same arguments and
the same results.
"""

from __future__ import annotations

from typing import Any

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_tensor_dict

from frugalpath.models.attention import check_window
from frugalpath.models.generation import to_device
from frugalpath.models.processor import token_types
from frugalpath.rl.batches import share, shuffle_groups, take
from frugalpath.rl.packing import PackedBatch, packed_mask, runs_of
from frugalpath.rl.rollout import Rollout, packed_logps
from frugalpath.rl.rollout_trainer import RolloutTrainer


class GroupTrainer(RolloutTrainer):
    """`GRPOTrainer` that reads, sees and prefills each prompt once for all its completions.

    Args:
        args: TRL's own, with `args` a `GroupConfig`, whose switches turn the shortcuts off one by one.
    """

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
        self._batch.rows = inputs["prompt_index"].tolist()
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
        batch = self._batch
        if batch.defer_old or self._without_loss:
            # The first pass after the rollouts is the old policy's; `_prepare_inputs` makes what is needed of it.
            batch.defer_old = False
            return torch.zeros(completions.shape, device=input_ids.device), None, None
        if not self.args.shared_prefix or compute_aux_loss:
            fields = batch.fields(self.sight)
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
            batch.logps = stock[0].detach()
            return stock
        check_window(model, max(map(len, batch.prompts)) + logits_to_keep)
        written = valid.sum(1).tolist()
        forwards = batch.forwards(written, batch_size)
        self._count(sum(batch.packed_length(g, written) for groups in forwards for g in groups))
        packed = batch.packed(forwards, completions, valid, self._tokenizer.pad_token_id)
        autocast = self.accelerator.autocast
        logps, entropies = packed_logps(model, self.sight, packed, completions, self._mask, autocast, compute_entropy)
        batch.logps = logps.detach()
        return logps, entropies, None

    def _mask(self, packed: PackedBatch) -> dict[str, Any]:
        """Attention arguments of a packed forward."""
        token = self.sight.image_token_id
        # Image tokens of packed rows that see each other, where the family has such.
        runs = runs_of(packed.input_ids, token) if self.sight.bidirectional and token is not None else None
        return packed_mask(packed.segment, self._attention, self._dtype(), runs)

    def _dtype(self) -> torch.dtype:
        """Of the queries in a forward."""
        device = self.accelerator.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.model.dtype

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        kept = self._teaching(inputs)
        part = inputs if kept is None else {k: take(v, kept, len(inputs["prompt_ids"])) for k, v in inputs.items()}
        self._batch.rows = part["prompt_index"].tolist()
        loss = super()._compute_loss(model, part)
        if self.num_iterations > 1 and self.model.training and "old_per_token_logps" not in inputs:
            old = torch.zeros_like(inputs["completion_ids"], dtype=self._batch.logps.dtype)
            fresh = self._batch.logps
            inputs["old_per_token_logps"] = fresh if kept is None else old.index_copy(0, kept, fresh)
        return loss if kept is None else loss * share(self.loss_type, inputs, kept)

    def _teaching(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Rows that the loss is computed over, None for all: those of silent groups are left out where they can be."""
        others = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0 or self.aux_loss_enabled
        if others or self.beta != 0.0 or not self.args.skip_zero_advantage or not self.model.training:
            return None
        rows = Rollout(self._batch.prompts, inputs["prompt_index"].tolist())
        return rows.teaching(inputs["completion_mask"].sum(1).tolist(), inputs["advantages"])

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, None, None]:
        # Buffered training batches still hold indices of its prompts.
        batch, self._batch = self._batch, Rollout()
        try:
            if not self.args.skip_eval_loss:
                return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            self._without_loss = not self._corrected
            with torch.no_grad():
                self._prepare_inputs(inputs)
            return None, None, None
        finally:
            self._batch, self._without_loss = batch, False
