"""A vision-language model over stored patch features: aligner, then any causal language model.

The visual tokens stand as a prefix-like block where the image tokens of the text are (PathoSynVLM: LayerNorm,
two-layer MLP, LayerNorm; methods 3.1). The frozen patch encoder runs outside, once per slide.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from models.visual import PLACE

WAVES = (1, 2, 4)
"""Half periods across the field of the sines and cosines that describe a token's place."""


class SlideVLMConfig(PreTrainedConfig):
    """Configuration of `SlideVLM`.

    Args:
        text_config: configuration of the causal language model.
        feature_dim: width d of the patch features.
        image_token_id: token that a visual token replaces.
        aligner_width: hidden width of the aligner's MLP.
        aligner_dropout: dropout on the standardised features and inside the MLP.
    """

    model_type = "slide_vlm"
    # Read by TRL when it loads the reference model; no code of a repository is meant.
    auto_map: ClassVar[dict[str, str]] = {}
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        feature_dim: int = 1280,
        image_token_id: int = 3,
        aligner_width: int = 256,
        aligner_dropout: float = 0.1,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("qwen2")
        self.feature_dim = feature_dim
        self.image_token_id = image_token_id
        self.aligner_width = aligner_width
        self.aligner_dropout = aligner_dropout
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)


class Aligner(nn.Module):
    """Patch features and their places as embeddings of the language model: (n, d + 3) -> (n, hidden)."""

    def __init__(self, config: SlideVLMConfig):
        super().__init__()
        hidden = config.text_config.hidden_size
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("std", torch.ones(config.feature_dim))
        self.features = nn.Sequential(
            nn.LayerNorm(config.feature_dim),
            nn.Dropout(config.aligner_dropout),
            nn.Linear(config.feature_dim, config.aligner_width),
        )
        self.place = nn.Linear(PLACE * (1 + 2 * len(WAVES)), 2 * config.aligner_width)
        self.out = nn.Sequential(
            nn.GELU(),
            nn.Dropout(config.aligner_dropout),
            nn.Linear(config.aligner_width, hidden),
            nn.LayerNorm(hidden),
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.place.weight.dtype)
        features, place = rows[:, :-PLACE], rows[:, -PLACE:]
        waves = [wave(k * torch.pi * place) for k in WAVES for wave in (torch.sin, torch.cos)]
        # Place scales the features as well as shifting them (FiLM, Perez et al. 2018, section 2.1), so that the mean
        # over tokens already says where the lesion is.
        scale, shift = self.place(torch.cat([place, *waves], -1)).chunk(2, -1)
        return self.out(self.features((features - self.mean) / self.std) * (1 + scale) + shift)

    @torch.no_grad()
    def standardise(self, rows: torch.Tensor) -> None:
        """Set mean and deviation of the features from training rows (n, d + 3)."""
        features = rows[:, :-PLACE].float()
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp_min(1e-3))


class SlideVLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = SlideVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["Aligner"]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Aligner):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.std)
            # A few place columns stand beside hundreds of feature columns: equal say at the start.
            nn.init.normal_(module.place.weight, std=0.2)


class SlideVLMModel(SlideVLMPreTrainedModel):
    """Aligner and language backbone; returns hidden states."""

    def __init__(self, config: SlideVLMConfig):
        super().__init__(config)
        self.aligner = Aligner(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Embeddings (B, T, hidden) of the text with the visual tokens in their places.

        Raises:
            ValueError: the number of image tokens differs from the number of visual tokens.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        here = input_ids == self.config.image_token_id
        if int(here.sum()) != len(pixel_values):
            raise ValueError(f"{int(here.sum())} image tokens in the text but {len(pixel_values)} visual tokens")
        return embeds.masked_scatter(here[..., None], self.aligner(pixel_values).to(embeds.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As a text backbone; `pixel_values` (rows, d + 3) fill the image tokens of `input_ids` in order."""
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class SlideVLM(SlideVLMPreTrainedModel, GenerationMixin):
    """`SlideVLMModel` with its language head; trains and generates like a stock transformers model."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SlideVLMConfig):
        super().__init__(config)
        self.model = SlideVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, name: str, tokenizer: Any, **config: Any) -> SlideVLM:
        """Join a new aligner to a causal language model that `from_pretrained` finds.

        Its embeddings grow if the tokenizer has more tokens than the model.
        """
        text = AutoModelForCausalLM.from_pretrained(name)
        if len(tokenizer) > text.get_input_embeddings().num_embeddings:
            text.resize_token_embeddings(len(tokenizer))
        model = cls(SlideVLMConfig(text_config=text.config, **config))
        model.model.language_model = text.base_model
        model.lm_head = text.get_output_embeddings()
        model.generation_config = text.generation_config
        return model

    @property
    def language_model(self) -> nn.Module:
        """The stock transformers backbone."""
        return self.model.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, vocabulary) and, with labels, the causal cross-entropy."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict:
        out = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            out["pixel_values"] = pixel_values
        return out


AutoConfig.register("slide_vlm", SlideVLMConfig)
AutoModel.register(SlideVLMConfig, SlideVLMModel)
AutoModelForCausalLM.register(SlideVLMConfig, SlideVLM)
