"""A performer from a recipe: from a saved folder, from any causal language model, or from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from envs.case import Case
from models.performer import Performer, question_text
from models.processor import SlideProcessor
from models.slide_vlm import SlideVLM, SlideVLMConfig
from models.tokenizer import IMAGE_TOKEN, train_tokenizer
from models.visual import FeatureBank
from slides.errors import InputError


@dataclass
class PerformerConfig:
    """The `performer` part of a recipe.

    Args:
        checkpoint: folder that a run wrote, or that `Performer.save` wrote; nothing else is read then.
        language_model: anything `AutoModelForCausalLM.from_pretrained` takes; null builds a small one from nothing.
        layers, hidden, heads, kv_heads, ffn, vocab_size: shape of the small one (a Qwen2).
        aligner_width, aligner_dropout: see `SlideVLMConfig`.
        show_options: list a choice case's options after its prompt.
        system: system message.
    """

    checkpoint: str | None = None
    language_model: str | None = None
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 256
    vocab_size: int = 1024
    aligner_width: int = 256
    aligner_dropout: float = 0.1
    show_options: bool = True
    system: str | None = None


def build_performer(config: PerformerConfig, cases: list[Case], bank: FeatureBank, seed: int = 0) -> Performer:
    """Make the performer that a recipe describes; `cases` are the training cases (texts for a new tokenizer)."""
    options: dict[str, Any] = {"show_options": config.show_options, "system": config.system}
    if config.checkpoint:
        if not (Path(config.checkpoint) / "config.json").is_file():
            raise InputError(
                f"performer.checkpoint: {config.checkpoint} holds no config.json; name a folder that a run has written"
            )
        performer = Performer.load(config.checkpoint, bank, **options)
        if performer.model.config.feature_dim != bank.dim:
            raise InputError(
                f"performer.checkpoint: {config.checkpoint} reads features of width "
                f"{performer.model.config.feature_dim}, the cases have {bank.dim}; use the encoder it was trained with"
            )
        return performer
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "feature_dim": bank.dim,
        "aligner_width": config.aligner_width,
        "aligner_dropout": config.aligner_dropout,
    }
    if config.language_model:
        tokenizer = AutoTokenizer.from_pretrained(config.language_model, padding_side="left")
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        model = SlideVLM.from_language_model(config.language_model, tokenizer, image_token_id=image_token_id, **shared)
    else:
        texts = [t for c in cases for t in (question_text(c, config.show_options), c.answer, *(c.options or ()))]
        tokenizer = train_tokenizer(texts, config.vocab_size)
        text_config = AutoConfig.for_model(
            "qwen2",
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            # The usual 0.02 is meant for widths in the thousands; here it would leave every layer near zero.
            initializer_range=config.hidden**-0.5,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        model = SlideVLM(SlideVLMConfig(text_config=text_config, image_token_id=image_token_id, **shared))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    performer = Performer(model, SlideProcessor(tokenizer), bank, **options)
    sources = list(dict.fromkeys(s for c in cases for s in performer.sources(c)))
    step = max(1, len(sources) // 256)
    rows = [bank.see(s, 16).rows for s in sources[::step]]
    model.model.aligner.standardise(torch.cat(rows))
    return performer
