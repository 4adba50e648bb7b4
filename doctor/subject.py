"""The model of a recipe without its weights: its configuration, and models built without memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

from frugalpath.errors import InputError
from frugalpath.models.build import MARKS_OF, SEEING, PerformerConfig, small_text
from frugalpath.models.cross_attention import spread
from frugalpath.models.gemma_vl import freeze_gemma, small_gemma
from frugalpath.models.language_model import located
from frugalpath.models.qwen_vl import freeze_vision, small_qwen
from frugalpath.models.slide_config import SlideVLMConfig
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.tokenizer import train_tokenizer

SMALL: dict[str, Callable[..., Any]] = {
    "qwen_vl": small_qwen,
    "gemma_vl": lambda tokenizer, text: small_gemma(tokenizer, text)[0],
}
"""Builders of untrained models for the families with a vision tower."""
KNOWN = Path(__file__).with_name("configs.json")
"""Configurations of some models on the Hub, as in their `config.json`."""


@cache
def known_configs() -> dict[str, dict[str, Any]]:
    """Built-in configurations that need no Hub, by name."""
    return json.loads(KNOWN.read_text())


def read_config(name: str) -> Any:
    """Read a model's configuration from a folder, `known_configs`, or the Hub and its cache.

    Raises:
        InputError: it was found nowhere.
    """
    if not Path(name).exists() and name in known_configs():
        return AutoConfig.for_model(**known_configs()[name])
    try:
        return AutoConfig.from_pretrained(**located(name))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: its configuration was not found ({str(error).splitlines()[0]}); name a folder with a "
            f"config.json, or one of {', '.join(known_configs())}, or run with a hub in reach"
        ) from error


@dataclass(frozen=True)
class Subject:
    """A model to trace.

    Args:
        config: of the whole model. dtype: of its weights.
        performer: the recipe's.
    """

    config: Any
    dtype: torch.dtype
    performer: PerformerConfig

    @classmethod
    def of(cls, performer: PerformerConfig, feature_dim: int) -> Subject:
        """Build the subject from a recipe's performer.

        Args:
            feature_dim: width of the features that a slide_vlm reads.
        """
        if performer.checkpoint:
            config = read_config(performer.checkpoint)
            return cls(config, _kept(config), performer)
        if performer.family in SMALL:
            if performer.pretrained:
                config = read_config(performer.pretrained)
                # As `frugalpath.models.build` loads it: weights that are trained are float32.
                return cls(config, _kept(config) if performer.lora is not None else torch.float32, performer)
            tokenizer = train_tokenizer(["a"], performer.vocab_size, MARKS_OF[performer.family])
            with torch.device("meta"):
                small = SMALL[performer.family](
                    tokenizer, small_text(performer, tokenizer, vocab_size=performer.vocab_size)
                )
            return cls(small.config, torch.float32, performer)
        if performer.language_model:
            text = read_config(performer.language_model)
        else:
            tokenizer = train_tokenizer(["a"], performer.vocab_size)
            values = small_text(performer, tokenizer, vocab_size=performer.vocab_size)
            text = AutoConfig.for_model("qwen2", **values)
        shared = {key: getattr(performer, key) for key in SEEING}
        return cls(SlideVLMConfig(text_config=text, feature_dim=feature_dim, **shared), torch.float32, performer)

    @property
    def key(self) -> str:
        """Key that identifies this model."""
        return f"{self.config.to_json_string(use_diff=False)} {self.dtype} {self.performer}"

    @property
    def text(self) -> Any:
        """Configuration of the language model."""
        return self.config.get_text_config()

    @property
    def layers(self) -> int:
        """Number of layers of the language model."""
        return self.text.num_hidden_layers

    @property
    def routes(self) -> int:
        """Number of layers that attend to visual tokens outside the text."""
        if getattr(self.config, "in_text", True):
            return 0
        layers = self.config.cross_layers
        return len(layers if layers is not None else spread(self.layers))

    def shorter(self, layers: int, routes: int) -> Subject:
        """Where layers look at visual tokens outside the text: with only the last `routes` of `layers` that do."""
        if not self.routes:
            return self
        config = copy.deepcopy(self.config)
        config.cross_layers = list(range(layers - routes, layers))
        return replace(self, config=config)

    def build(self, layers: int | None = None, attention: str = "sdpa") -> Any:
        """Build the model on a device without data, optionally with fewer layers.

        A vision tower is shortened as well: it keeps nothing of a layer when the next one works.
        """
        config = copy.deepcopy(self.config)
        if layers is not None:
            text = config.get_text_config()
            text.num_hidden_layers = layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:layers]
            _shorten(getattr(config, "vision_config", None))
        model = _make(config, attention, self.dtype)
        if self.performer.family in SMALL and self.performer.freeze_vision:
            (freeze_gemma if config.model_type == "gemma3" else freeze_vision)(model)
        return model


def _make(config: Any, attention: str, dtype: torch.dtype) -> Any:
    kind: Any = {
        "slide_vlm": SlideVLM,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "gemma3": Gemma3ForConditionalGeneration,
    }.get(config.model_type)
    if kind is not None:
        return kind._from_config(config, attn_implementation=attention, dtype=dtype)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=attention, dtype=dtype)


def _shorten(vision: Any) -> None:
    if vision is None:
        return
    if hasattr(vision, "depth"):
        vision.depth, vision.fullatt_block_indexes = 1, [0]
    else:
        vision.num_hidden_layers = 2  # the second works beside what the first was given


def _kept(config: Any) -> torch.dtype:
    """Dtype of a checkpoint's weights, as its configuration states."""
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
