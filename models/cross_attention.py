"""Gated cross-attention from a few layers of a language model to visual tokens that are not in its sequence.

LoC-Path's routing adapter in the reconstruction of methods 2.3, with Flamingo's gate (Alayrac et al. 2022, section
2.2): h <- h + tanh(g) CrossAttn(h, Z) before a layer, g = 0 at the start, so that the model begins as it was. The text
stays as long as it is, and a layer costs O(T M) for M visual tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from frugalpath.errors import InputError

MEMORY = "visual_memory"
"""Keyword argument that carries the memory through the language model to its layers."""


@dataclass(frozen=True)
class Memory:
    """What the layers look at, computed once for a prompt.

    Args:
        keys, values: of each adapted layer, each (B, heads, M + 1, width of a head).
        mask: (B, 1, 1, M + 1), added to the scores; the first column is an empty token that all may look at, so that
            a row without visual tokens has something to look at, and a token need not look at any.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    mask: torch.Tensor


class CrossAttention(nn.Module):
    """One layer's gated look at the visual tokens."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.memory_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(1))

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, n, hidden) as (B, heads, n, hidden / heads)."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def remember(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens (B, M, hidden), the empty one before them."""
        tokens = self.memory_norm(tokens)
        empty = (0, 0, 1, 0)
        return F.pad(self.split(self.key(tokens)), empty), F.pad(self.split(self.value(tokens)), empty)

    def forward(
        self, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        query = self.split(self.query(self.norm(hidden)))
        seen = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), mask.to(query.dtype))
        return hidden + self.gate.tanh() * self.out(seen.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def reset(self) -> None:
        """Initial value that a model's own initialisation does not know: a closed gate."""
        nn.init.zeros_(self.gate)


class Routes(nn.Module):
    """The adapters of all chosen layers.

    Args:
        layers: numbers of the layers, from 0. heads: of each cross-attention.

    Raises:
        InputError: no layer, or heads that do not divide the hidden width.
    """

    def __init__(self, hidden: int, layers: Sequence[int], heads: int):
        super().__init__()
        if not layers:
            raise InputError("performer.cross_layers: the list is empty; name a layer, or leave the key out")
        if heads < 1 or hidden % heads:
            raise InputError(
                f"performer.cross_heads: {heads} heads do not divide a width of {hidden}; choose another number"
            )
        self.layers = list(layers)
        self.adapters = nn.ModuleList(CrossAttention(hidden, heads) for _ in layers)

    def remember(self, tokens: torch.Tensor, lengths: torch.Tensor) -> Memory:
        """Keys and values of visual tokens (B, M, hidden), of which row b has `lengths[b]`."""
        keys, values = zip(*(a.remember(tokens) for a in self.adapters), strict=True)
        place = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        mask = torch.zeros(len(tokens), len(place), device=tokens.device, dtype=tokens.dtype)
        mask = mask.masked_fill(place > lengths[:, None], torch.finfo(tokens.dtype).min)
        return Memory(keys, values, mask[:, None, None, :])

    def forward(self, at: int, hidden: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Hidden states (B, T, hidden) before the `at`-th of the chosen layers, after its look at the memory."""
        return self.adapters[at](hidden, memory.keys[at], memory.values[at], memory.mask)

    def flops(self, text: float, tokens: float) -> float:
        """FLOPs of `text` positions that look at `tokens` visual tokens, whose keys and values are made once."""
        d = self.adapters[0].query.in_features
        return len(self.layers) * (4.0 * d * d * text + 4.0 * d * text * (tokens + 1) + 4.0 * d * d * tokens)


def attach(owner: Any, language_model: nn.Module) -> None:
    """Let the chosen layers of a language model look at the memory that its forward is given.

    Args:
        owner: the module whose `routes` is a `Routes`; it is looked up in every forward, as adapters of training
            (PEFT) replace it.

    Raises:
        InputError: the language model has no layer of such a number.
    """
    layers = decoder_layers(language_model)
    wrong = [n for n in owner.routes.layers if not 0 <= n < len(layers)]
    if wrong:
        raise InputError(f"performer.cross_layers: {wrong} are not layers of a model that has 0 to {len(layers) - 1}")
    for at, number in enumerate(owner.routes.layers):
        # A bound method is copied with its owner, where a closure would go on calling the original.
        layers[number].register_forward_pre_hook(functools.partial(_look, owner, at), with_kwargs=True)


def _look(owner: Any, at: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    memory = kwargs.pop(MEMORY, None)
    if memory is None:
        return args, kwargs
    if args:
        return (owner.routes(at, args[0], memory), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": owner.routes(at, kwargs["hidden_states"], memory)}


def decoder_layers(language_model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers backbone."""
    count = language_model.config.num_hidden_layers
    for module in language_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{language_model.config.model_type}: its decoder layers were not found; use fusion: prefix")


def spread(layers: int) -> list[int]:
    """A quarter, half and three quarters of the way through a model of so many layers."""
    return sorted({layers // 4, layers // 2, 3 * layers // 4})
