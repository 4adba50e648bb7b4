"""Stand-ins for GPU kernels when tracing on a CPU: they allocate the same tensors and compute nothing.

On a CPU the kernels themselves are traced.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE, ChunkedLogProbFunction
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

GPU = "traced_gpu"


class _Attend(torch.autograd.Function):
    """Flash or memory-efficient attention: keeps its inputs, its output and a float32 number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix_length: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `frugalpath.models.attention.shared_prefix_attention` on a GPU; without a prefix as transformers' `sdpa`."""
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    n = prefix_length
    parts = []
    if n:
        parts.append(_Attend.apply(query[:, :, :n], key[:, :, :n], value[:, :, :n], None))
    mask = attention_mask
    if mask is not None:
        groups = query.shape[1] // key.shape[1]
        # With a mask the kernels want keys and values of every head, and a mask that is added.
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
        mask = mask.to(query.dtype)
    parts.append(_Attend.apply(query[:, :, n:], key, value, mask))
    return torch.cat([part.transpose(1, 2) for part in parts], 1).contiguous(), None


AttentionInterface.register(GPU, _attention)
AttentionMaskInterface.register(GPU, sdpa_mask)


class _FusedHead(torch.autograd.Function):
    """TRL's fused head by its Triton kernels: one tile of logits, and gradients in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        lower = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.lower = lower
        ctx.save_for_backward(hidden, weight)
        _tile(hidden, weight, lower)
        return hidden.new_zeros(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        _tile(hidden, weight, ctx.lower)
        return (
            of_hidden.to(hidden.dtype) if of_hidden is not None else None,
            of_weight.to(weight.dtype) if of_weight is not None else None,
        )


def _tile(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> None:
    buffer = hidden.new_empty(min(len(hidden), TOKEN_CHUNK_SIZE), _CHUNKED_LOGPROB_CHUNK_SIZE, dtype=dtype)
    part = weight[:_CHUNKED_LOGPROB_CHUNK_SIZE].to(dtype)
    del buffer, part


def score(hidden: torch.Tensor, weight: torch.Tensor, scored: int, top1: bool, gpu: bool) -> torch.Tensor:
    """Log-probabilities as TRL's fused head makes them.

    Args:
        hidden: (rows, T, d) of the last layer. weight: (vocabulary, d).
        scored: positions with a label in all rows; on a GPU only those are read.
        top1: as supervised training, which logs whether the label is the likeliest token.
    """
    rows = hidden[:, :-1]
    if gpu:
        return _FusedHead.apply(rows.reshape(-1, rows.shape[-1])[:scored].clone(), weight)
    flat = rows.reshape(-1, rows.shape[-1])
    labels = torch.zeros(len(flat), dtype=torch.long)
    outputs = ("log_probs", "entropy", *(("is_top1",) if top1 else ()))
    # Where the vocabulary is smaller than TRL's tile, the rest of it is never touched, so not resident.
    wide = min(_CHUNKED_LOGPROB_CHUNK_SIZE, len(weight))
    return ChunkedLogProbFunction.apply(flat, weight, None, labels, 1.0, wide, None, 1.0, outputs)[0]
