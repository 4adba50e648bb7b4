"""A vision-language model over stored patch features: compressors, an aligner, then any causal language model.

The visual tokens stand where the image tokens of the text are, or outside the text, where a few layers look at them by
cross-attention. The frozen patch encoder and compressors without parameters run outside, once a slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from frugalpath.models.adapters import adapter_of, grown_base, merge_adapter
from frugalpath.models.compressors.aligner import MARKER_STD, Markers, make_aligner
from frugalpath.models.compressors.base import PatchEmbedding, Tokens
from frugalpath.models.compressors.chain import Chain
from frugalpath.models.cross_attention import MEMORY, Memory, Routes, attach, spread
from frugalpath.models.feature_bank import COLUMNS
from frugalpath.models.language_model import load_language_model
from frugalpath.models.slide_config import SlideVLMConfig

ADDED_STD = 0.3
"""Deviation of the initial values of markers that are added to tokens."""


@dataclass
class SlideBackboneOutput(BaseModelOutputWithPast):
    """As its base, and what layers looked at; it is given again with every further token."""

    visual_memory: Memory | None = None


@dataclass
class SlideOutput(CausalLMOutputWithPast):
    """As its base, and what layers looked at; it is given again with every further token."""

    visual_memory: Memory | None = None


class SlideVLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = SlideVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset"):
            module.reset()


class SlideVLMModel(SlideVLMPreTrainedModel):
    """Compressors, aligner and language backbone; returns hidden states.

    Args:
        language_model: backbone that `from_pretrained` gave; None makes one from nothing.
    """

    def __init__(self, config: SlideVLMConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        text = config.text_config
        hidden = text.hidden_size
        self.compressor = Chain(config.compressors, config.feature_dim, hidden)
        self.aligner = make_aligner(
            config.aligner, self.compressor.out_dim, hidden, config.aligner_width, config.aligner_dropout
        )
        self.markers = None
        if config.markers != "none":
            # Added to tokens of about unit scale, a marker of the published scale would be lost in them.
            std = MARKER_STD if config.in_text else ADDED_STD
            self.markers = Markers(hidden, config.markers == "unique", config.max_slides, std)
        self.routes = None
        if not config.in_text:
            layers = config.cross_layers if config.cross_layers is not None else spread(text.num_hidden_layers)
            self.routes = Routes(hidden, layers, config.cross_heads or text.num_attention_heads)
        self.language_model = AutoModel.from_config(text) if language_model is None else language_model
        if self.routes is not None:
            attach(self, self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @torch.no_grad()
    def standardise(self, features: torch.Tensor) -> None:
        """Set mean and deviation of the features from those (n, d) of training slides, where they are first read."""
        for part in (*self.compressor.learned, self.aligner):
            readers = [m for m in part.modules() if isinstance(m, PatchEmbedding)]
            for reader in readers:
                reader.standardise(features)
            if readers:
                return  # what follows reads tokens that were made of them

    def visual_tokens(
        self, pixel_values: torch.Tensor, shown: torch.Tensor | None, questions: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Embeddings (n_v, hidden) of the tokens of each view, with its marker.

        Args:
            pixel_values: rows of all views, see `VisualTokens`. shown, questions: see `forward`.

        Raises:
            ValueError: `shown` is missing where rows alone do not say which view they belong to.
        """
        if shown is None:
            if self.compressor.learned or self.markers is not None or self.routes is not None:
                raise ValueError("`shown` is missing: this model compresses, marks or routes the rows of each view")
            return [self._aligned(pixel_values)]
        counts, budgets, _, slides = shown.unbind(1)
        rows = pixel_values.split(counts.tolist())
        blocks = self._compressed(rows, budgets.tolist(), questions) if self.compressor.learned else rows
        made = list(torch.cat([self._aligned(block) for block in blocks]).split([len(b) for b in blocks]))
        if self.markers is None:
            return made
        marked = zip(self.markers(slides), made, strict=True)
        if self.routes is not None:
            return [block + mark for mark, block in marked]
        return [torch.cat([mark[None], block]) for mark, block in marked]

    def _aligned(self, rows: torch.Tensor) -> torch.Tensor:
        return self.aligner(rows[:, :-COLUMNS], rows[:, -COLUMNS:-1])

    def _compressed(
        self, rows: Sequence[torch.Tensor], budgets: Sequence[int], questions: torch.Tensor | None
    ) -> list[torch.Tensor]:
        asked = None
        if questions is not None:
            known = (questions >= 0)[..., None]
            words = self.get_input_embeddings()(questions.clamp_min(0)) * known
            asked = words.sum(1) / known.sum(1).clamp_min(1)
        blocks: list[torch.Tensor | None] = [None] * len(rows)
        for budget in dict.fromkeys(budgets):
            at = [i for i, b in enumerate(budgets) if b == budget]
            tokens = Tokens.from_rows([rows[i] for i in at])
            made = self.compressor(tokens, budget, None if asked is None else asked[at]).rows()
            for i, block in zip(at, made, strict=True):
                blocks[i] = block
        return [b for b in blocks if b is not None]

    def memory(self, blocks: Sequence[torch.Tensor], owners: torch.Tensor, rows: int) -> Memory:
        """Keys and values of the visual tokens of each of `rows` rows, to which the blocks belong by `owners` (V,)."""
        assert self.routes is not None
        own = owners.tolist()
        nothing = blocks[0][:0]
        joined = [torch.cat([nothing, *(b for b, o in zip(blocks, own, strict=True) if o == r)]) for r in range(rows)]
        lengths = torch.tensor([len(j) for j in joined], device=nothing.device)
        return self.routes.remember(pad_sequence(joined, batch_first=True), lengths)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        shown: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
        visual_memory: Memory | None = None,
        **kwargs: Any,
    ) -> SlideBackboneOutput:
        """As a text backbone that sees.

        Args:
            pixel_values: (rows, d + 4) of all views, in the order of their tokens in `input_ids`.
            shown: (V, 4) of each view its rows, its budget, the row of the batch it belongs to, its slide's number.
            questions: (V, Q) token ids of each view's question, -1 where it is shorter.
            visual_memory: of an earlier forward over the same rows, for the tokens that follow.

        Raises:
            ValueError: the number of image tokens differs from the number of visual tokens.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and visual_memory is None:
                blocks = self.visual_tokens(pixel_values, shown, questions)
                if self.routes is None:
                    inputs_embeds = self._in_places(inputs_embeds, input_ids, torch.cat(blocks))
                else:
                    assert shown is not None
                    visual_memory = self.memory(blocks, shown[:, 2], len(input_ids))
            elif self.training and torch.is_grad_enabled() and _several_processes():
                inputs_embeds, visual_memory = self._unseen(inputs_embeds)
        if visual_memory is not None:
            kwargs[MEMORY] = visual_memory
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return SlideBackboneOutput(out.last_hidden_state, out.past_key_values, visual_memory=visual_memory)

    def _unseen(self, embeds: torch.Tensor) -> tuple[torch.Tensor, Memory | None]:
        """Embeddings (B, T, hidden) as they are, and nothing to look at, in the graph of a view that counts nothing.

        So every weight has a gradient in every batch of several processes, of zeros in one without images: processes
        that share gradients out (DeepSpeed, FSDP) expect the same ones from each other.
        """
        rows = embeds.new_zeros(1, self.config.feature_dim + COLUMNS)
        view = torch.tensor([[1, 1, 0, 0]], device=embeds.device)
        blocks = self.visual_tokens(rows, view, None)
        if self.routes is None:
            return embeds + 0 * torch.cat(blocks).sum(), None
        return embeds, self.memory(blocks, view[:, 2] - 1, len(embeds))

    def _in_places(self, embeds: torch.Tensor, input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        here = input_ids == self.config.image_token_id
        if int(here.sum()) != len(tokens):
            raise ValueError(f"{int(here.sum())} image tokens in the text but {len(tokens)} visual tokens")
        return embeds.masked_scatter(here[..., None], tokens.to(embeds.dtype))


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class SlideVLM(SlideVLMPreTrainedModel, GenerationMixin):
    """`SlideVLMModel` with its language head; trains and generates like a stock transformers model.

    Args:
        text: causal language model that `from_pretrained` gave; None makes one from nothing.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: SlideVLMConfig, text: PreTrainedModel | None = None):
        super().__init__(config)
        if text is None:
            self.model = SlideVLMModel(config)
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        else:
            self.model = SlideVLMModel(config, text.base_model)
            self.lm_head = text.get_output_embeddings()
        self.post_init()

    @classmethod
    def from_language_model(cls, name: str, tokenizer: Any, **config: Any) -> SlideVLM:
        """Join a new aligner to a causal language model, see `load_language_model`.

        Its embeddings grow if the tokenizer has more tokens than the model.
        """
        text = load_language_model(name)
        if len(tokenizer) > text.get_input_embeddings().num_embeddings:
            text.resize_token_embeddings(len(tokenizer))
        # A configuration hands its attention on to those within it: naming none would take away what was loaded.
        attention = text.config._attn_implementation
        model = cls(SlideVLMConfig(text_config=text.config, attn_implementation=attention, **config), text)
        model.generation_config = text.generation_config
        return model

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> SlideVLM:
        """As its base; a folder that holds an adapter is read over the language model that the adapter names."""
        adapter = adapter_of(name)
        if adapter is None:
            return super().from_pretrained(name, *args, **kwargs)
        config = SlideVLMConfig.from_pretrained(name)
        model = cls(config, grown_base(adapter, config.text_config.vocab_size))
        model.generation_config = GenerationConfig.from_pretrained(name)
        return merge_adapter(model, adapter).eval()

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
        shown: torch.Tensor | None = None,
        questions: torch.Tensor | None = None,
        visual_memory: Memory | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> SlideOutput:
        """Logits (B, T, vocabulary) and, with labels, the causal cross-entropy; see `SlideVLMModel.forward`."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            shown=shown,
            questions=questions,
            visual_memory=visual_memory,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return SlideOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, visual_memory=out.visual_memory
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict:
        out = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            out["pixel_values"] = None
        return out

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict, *args: Any, **rest: Any) -> dict:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **rest)
        return {**model_kwargs, MEMORY: outputs.visual_memory}


AutoConfig.register("slide_vlm", SlideVLMConfig)
AutoModel.register(SlideVLMConfig, SlideVLMModel)
AutoModelForCausalLM.register(SlideVLMConfig, SlideVLM)
