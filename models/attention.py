"""Attention of language models under a mask of our own, and over rows that begin with a prefix all the rest sees.

The latter is registered with transformers as `shared_prefix`. Scaled dot-product attention with a mask computes every
pair of positions; here the prefix is plain causal attention, and only the queries after it pay for a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

SHARED_PREFIX = "shared_prefix"
FLEX = "shared_prefix_flex"
MASKED = ("sdpa", "eager", SHARED_PREFIX)
"""Implementations that take a dense mask."""


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prefix_length: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention (B, T, heads, d) of query (B, heads, T, d).

    Args:
        attention_mask: (B, 1, T - prefix_length, T) of the queries after the prefix; True or 0 where they may look.
        prefix_length: leading positions that see what is before them; 0 is attention as usual.
    """
    attend = _grouped if query.device.type == "cpu" else _stock
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)  # autocast may have changed the queries
    n = prefix_length
    if not n:
        return attend(module, query, key, value, attention_mask, **kwargs), None
    kwargs.pop("is_causal", None)
    head = attend(module, query[:, :, :n], key[:, :, :n], value[:, :, :n], None, is_causal=True, **kwargs)
    return torch.cat([head, attend(module, query[:, :, n:], key, value, attention_mask, **kwargs)], 1), None


def _stock(*args: Any, **kwargs: Any) -> torch.Tensor:
    return sdpa_attention_forward(*args, **kwargs)[0]


def _grouped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """As `sdpa_attention_forward`, but keys and values are not repeated for the heads that share them.

    On a CPU that is as exact and saves memory; with a mask, GPU kernels want them repeated.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
# Under a name of our own also for models that transformers does not offer it for; they take a ready mask all the same.
AttentionInterface.register(FLEX, flex_attention_forward)
AttentionMaskInterface.register(FLEX, flex_attention_mask)


def decoder(model: Any) -> Any:
    """The language model within a vision-language model, adapters or wrappers of training."""
    while hasattr(model, "module") and not hasattr(model, "get_decoder"):
        model = model.module
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.get_decoder()


def implementation(model: Any) -> str:
    """Name of the attention that the language model uses."""
    return decoder(model).config._attn_implementation


def share_prefix(model: Any, flex: bool = False) -> str:
    """Make a model ready for packed rows; returns the attention that it then uses.

    Args:
        flex: FlexAttention, which skips blocks of the mask where nothing may look; for a GPU.

    Raises:
        ValueError: its attention cannot keep the completions of a prompt apart; with the remedy.
    """
    text = decoder(model)
    name = text.config._attn_implementation
    if name not in (*MASKED, FLEX, "flex_attention"):
        raise ValueError(
            f"attn_implementation {name!r} takes no block mask, which a shared prompt needs: load the model with "
            "'sdpa', or set shared_prefix to false"
        )
    if flex or name == "flex_attention":
        text.set_attn_implementation(FLEX)
    elif name == "sdpa":
        text.set_attn_implementation(SHARED_PREFIX)
    return implementation(model)


def check_window(model: Any, length: int) -> None:
    """Refuse rows of which some layer sees a part only, as our masks are the same for all layers.

    Args:
        length: positions of the longest row.

    Raises:
        ValueError: with the remedy.
    """
    config = decoder(model).config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds == {"sliding_attention"} and length <= config.sliding_window:
        return
    if kinds:
        raise ValueError(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}, which see a part of a row of {length} "
            "tokens only; set shared_prefix and prefill_once to false, or take a model without them"
        )


@contextmanager
def dense_attention(model: Any) -> Iterator[None]:
    """Context in which the language model's attention takes a dense mask."""
    before = implementation(model)
    if before in MASKED:
        yield
        return
    decoder(model).set_attn_implementation("sdpa")
    try:
        yield
    finally:
        decoder(model).set_attn_implementation(before)


def as_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask, True where a query may look, as what is added to the scores.

    All implementations of `MASKED` take that; of a boolean one each layer would make, and keep, its own.

    Args:
        dtype: of the queries.
    """
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
