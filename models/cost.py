"""Cost of an answer in floating-point operations (methods 9.2: a multiply-add counts 2).

FLOPs of the language model in training, rollouts among them; padding and attention are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class DecoderShape:
    """Shape of a decoder-only language model, as its transformers configuration gives it."""

    layers: int
    hidden: int
    kv_width: int
    ffn: int
    vocab: int
    query_width: int = 0
    """Of all heads; 0 where it is that of the hidden states."""

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Read the shape off a text configuration; grouped-query attention is taken into account."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        ffn = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        own = heads * head_dim if heads * head_dim != config.hidden_size else 0
        return cls(config.num_hidden_layers, config.hidden_size, kv * head_dim, ffn, config.vocab_size, own)

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.query_width or self.hidden

    @property
    def per_token(self) -> float:
        """FLOPs of all matrices of all layers for one token: 2 l (2 d d_q + 2 d d_kv + 3 d m)."""
        d = self.hidden
        return 2.0 * self.layers * (2 * d * self.queries + 2 * d * self.kv_width + 3 * d * self.ffn)

    def read(self, n: float) -> float:
        """FLOPs of all layers for n tokens (causal attention); what a KV cache of the first n of a prompt saves."""
        return n * self.per_token + 2.0 * self.layers * n * n * self.queries

    def prefill(self, n: float, cached: float = 0.0) -> float:
        """FLOPs to read n tokens, of which a KV cache has the first `cached`, to the logits of the last position."""
        return self.read(n) - self.read(cached) + 2.0 * self.hidden * self.vocab

    def decode(self, generated: float, n: float) -> float:
        """FLOPs to write `generated` tokens after a prefill of n; the first comes with the prefill."""
        steps = max(0.0, generated - 1)
        context = steps * n + steps * (steps + 1) / 2
        return steps * (self.per_token + 2.0 * self.hidden * self.vocab) + 4.0 * self.layers * self.queries * context

    def answer(self, visual: float, text: float, generated: float) -> float:
        """FLOPs of one answer: prefill of visual and prompt tokens, then decoding."""
        return self.prefill(visual + text) + self.decode(generated, visual + text)

    def train(self, tokens: float, length: float) -> float:
        """FLOPs of forward and backward (3 forwards) over `tokens` in rows of mean `length`, with all logits."""
        forward = tokens * (self.per_token + 2.0 * self.hidden * self.vocab)
        return 3 * (forward + 2.0 * self.layers * tokens * length * self.queries)


@dataclass(frozen=True)
class TowerShape:
    """Shape of Qwen2.5-VL's vision tower (peers 2.3): most layers attend within windows, a few to the whole image."""

    layers: int
    full_layers: int
    hidden: int
    ffn: int
    out: int
    patch: int
    window: int
    merge: int

    @classmethod
    def from_config(cls, config: Any) -> TowerShape:
        """Read the shape off a vision configuration."""
        pixels = 3 * config.temporal_patch_size * config.patch_size**2
        window = (config.window_size // config.patch_size) ** 2
        full = len(config.fullatt_block_indexes)
        return cls(
            config.depth,
            full,
            config.hidden_size,
            config.intermediate_size,
            config.out_hidden_size,
            pixels,
            window,
            config.spatial_merge_size**2,
        )

    def read(self, tokens: float) -> float:
        """FLOPs to turn an image into `tokens` tokens of the language model, `merge` patches each."""
        n, d = tokens * self.merge, self.hidden
        layers = 2.0 * self.layers * n * (4 * d * d + 3 * d * self.ffn)
        windowed = (self.layers - self.full_layers) * min(self.window, n)
        attention = 4.0 * d * n * (windowed + self.full_layers * n)
        wide = self.merge * d
        return layers + attention + 2.0 * n * self.patch * d + 2.0 * tokens * (wide * wide + wide * self.out)


@dataclass(frozen=True)
class SquareTowerShape:
    """Shape of a vision tower that reads every image as one square (SigLIP of Gemma 3); all layers see all of it."""

    layers: int
    hidden: int
    ffn: int
    patch: int
    patches: int
    tokens: int

    @classmethod
    def from_config(cls, config: Any, tokens: int) -> SquareTowerShape:
        """Read the shape off a vision configuration whose output is projected as so many tokens."""
        patches = (config.image_size // config.patch_size) ** 2
        pixels = config.num_channels * config.patch_size**2
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, pixels, patches, tokens)

    def read(self, out: int) -> float:
        """FLOPs to see one image and project its tokens to width `out`."""
        n, d = self.patches, self.hidden
        layers = 2.0 * self.layers * n * (4 * d * d + 2 * d * self.ffn) + 4.0 * self.layers * n * n * d
        return layers + 2.0 * n * self.patch * d + 2.0 * self.tokens * d * out


SEEING = ("visual", "vision_tower", "multi_modal_projector")
"""Parts of models that are not the language model."""


class FlopCount:
    """Counter of FLOPs since the last call of `take`.

    Args:
        model: that is trained; what has gradients by now is what is trained.
    """

    def __init__(self, model: nn.Module):
        own = {n: p for n, p in model.named_parameters() if not any(part in n for part in SEEING)}
        self._parameters = sum(_size(p) for n, p in own.items() if "embed_tokens" not in n)
        trained = sum(_size(p) for p in own.values() if p.requires_grad)
        self._trained = min(1.0, trained / max(1, self._parameters))
        self._flops = 0.0

    def add(self, tokens: int, update: bool = False) -> None:
        """Add a pass: 2 a parameter and token; an update 2 more for inputs and 2 for trained weights."""
        passes = 4 + 2 * self._trained if update else 2
        self._flops += passes * self._parameters * tokens

    def take(self) -> int:
        """Return the FLOPs added since the last call."""
        flops, self._flops = self._flops, 0.0
        return int(flops)


def _size(parameter: nn.Parameter) -> int:
    # Of a partitioned one (ZeRO-3) `numel` is 0.
    return getattr(parameter, "ds_numel", parameter.numel())
