"""Build a performer from a recipe: from a saved folder, any causal language model, or untrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.adapters import config_source
from frugalpath.models.feature_bank import COLUMNS, FeatureBank
from frugalpath.models.gemma_vl import MARKS, GemmaPerformer, small_gemma
from frugalpath.models.language_model import load_tokenizer
from frugalpath.models.performer import Performer, QwenPerformer, SlidePerformer, question_text
from frugalpath.models.processor import SlideProcessor, ViewProcessor
from frugalpath.models.qwen_vl import SPECIAL, QwenProcessor, QwenVisionAdapter, freeze_vision, small_qwen
from frugalpath.models.slide_config import SlideVLMConfig
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.tokenizer import IMAGE_TOKEN, train_tokenizer
from frugalpath.models.vision_adapter import TextVisionAdapter, VisionAdapter

FAMILIES = ("slide_vlm", "qwen_vl", "gemma_vl")
SEEING = (
    "compressors", "aligner", "aligner_width", "aligner_dropout", "markers", "max_slides", "fusion", "cross_layers",
    "cross_heads",
)  # fmt: skip
"""Keys of the performer that are keys of `SlideVLMConfig`."""
ASKING = ("show_options", "repeat_prompt", "system")
"""Keys of the performer that define the wording of questions."""
SEEING_PARTS = ("compressor", "aligner", "markers", "routes")
"""Modules of `SlideVLM` beside the language model."""
MARKS_OF = {"qwen_vl": SPECIAL, "gemma_vl": MARKS}
"""Special tokens that a family puts around its images."""
LORA_TARGETS = r".*language_model\.layers.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass
class PerformerConfig:
    """The `performer` part of a recipe.

    Args:
        family: "slide_vlm" (stored features, an aligner, any causal language model), "qwen_vl" (Qwen2.5-VL) or
            "gemma_vl" (Gemma 3), which see the image itself.
        checkpoint: folder that a run wrote, or that `Performer.save` wrote; nothing else is read then.
        language_model: of slide_vlm: a causal language model's name on a hub, its folder, its GGUF file, or
            `package:NAME/FILE.gguf`, a file inside an installed package; null builds a small one.
        pretrained: of qwen_vl and gemma_vl: anything `from_pretrained` takes; null builds a small one from nothing.
        freeze_vision: the vision tower is not trained, and sees each image (qwen_vl: and budget) once; gemma_vl has
            no other.
        lora: keys of peft's `LoraConfig`; the language model is trained through adapters, which are merged when a
            stage ends. Null trains all its weights.
        layers, hidden, heads, kv_heads, ffn, vocab_size: shape of the small language model (a Qwen2), and of the
            small vision tower.
        compressors, aligner, aligner_width, aligner_dropout, markers, max_slides, fusion, cross_layers, cross_heads:
            of slide_vlm, see `SlideVLMConfig`.
        show_options, repeat_prompt, system: see `Performer`.
    """

    family: str = "slide_vlm"
    checkpoint: str | None = None
    language_model: str | None = None
    pretrained: str | None = None
    freeze_vision: bool = True
    lora: dict[str, Any] | None = None
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 256
    vocab_size: int = 1024
    compressors: list[Any] = field(default_factory=lambda: ["pool"])
    aligner: str = "place"
    aligner_width: int = 256
    aligner_dropout: float = 0.1
    markers: str = "none"
    max_slides: int = 32
    fusion: str = "prefix"
    cross_layers: list[int] | None = None
    cross_heads: int | None = None
    show_options: bool = True
    repeat_prompt: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"performer.family: {self.family!r} is unknown; use one of {', '.join(FAMILIES)}")
        if self.family == "gemma_vl" and not self.freeze_vision:
            raise InputError("performer.freeze_vision: gemma_vl needs a frozen vision tower; set it to true")


def build_performer(
    config: PerformerConfig, cases: list[Case], bank: FeatureBank, seed: int = 0, texts: Sequence[str] = ()
) -> Performer:
    """Build the performer of a recipe.

    Args:
        cases: the training cases. A new tokenizer learns their texts, and `texts`.
    """
    if config.checkpoint:
        if not (Path(config.checkpoint) / "config.json").is_file():
            raise InputError(
                f"performer.checkpoint: {config.checkpoint} holds no config.json; name a folder that a run has written"
            )
        return load_performer(config.checkpoint, config, bank)
    torch.manual_seed(seed)
    if config.family == "qwen_vl":
        return _build_qwen(config, cases, bank, texts)
    if config.family == "gemma_vl":
        return _build_gemma(config, cases, bank, texts)
    return _build_slide(config, cases, bank, texts)


def load_performer(folder: str | Path, config: PerformerConfig, bank: FeatureBank) -> Performer:
    """Load a performer saved by `Performer.save`.

    Args:
        bank: may be empty; what is added to it later must be as wide as the features that the performer reads.

    Raises:
        InputError: its feature width differs from the cases'.
    """
    options: dict[str, Any] = {key: getattr(config, key) for key in ASKING}
    kind = AutoConfig.from_pretrained(config_source(folder)).model_type
    if kind == "qwen2_5_vl":
        return QwenPerformer.load(folder, bank, frozen=config.freeze_vision, **options)
    if kind == "gemma3":
        return GemmaPerformer.load(folder, bank, **options)
    performer = SlidePerformer.load(folder, bank, **options)
    if not bank.files:
        bank.dim = performer.model.config.feature_dim
    if performer.model.config.feature_dim != bank.dim:
        raise InputError(
            f"performer.checkpoint: {folder} reads features of width {performer.model.config.feature_dim}, the cases "
            f"have {bank.dim}; use the encoder it was trained with"
        )
    return performer


def make_vision_adapter(model: Any, processor: Any) -> VisionAdapter:
    """Make the vision adapter of a model.

    Raises:
        InputError: a vision-language model of an unknown family.
    """
    if isinstance(processor, ViewProcessor):
        return processor.sight
    kind = model.config.model_type
    if kind == "qwen2_5_vl":
        return QwenVisionAdapter(model.config.image_token_id, processor.image_processor)
    if kind == "gemma3":
        raise InputError(
            "model: gemma3 pools its image tokens; pass a `frugalpath.models.gemma_vl.GemmaProcessor` with it"
        )
    if hasattr(model.config, "vision_config"):
        raise InputError(f"model: the family {kind} is unknown here; use one of {', '.join(FAMILIES)} and text models")
    return TextVisionAdapter()


def lora_config(config: PerformerConfig, model: Any) -> LoraConfig | None:
    """Adapters of the language model's projections; vision tower and head have none, `SEEING_PARTS` are trained.

    Args:
        model: that gets them.

    Raises:
        InputError: an unknown key, or a vision tower that is to be trained as well.
    """
    if config.lora is None:
        return None
    if config.family == "qwen_vl" and not config.freeze_vision:
        raise InputError("performer: lora trains adapters only, so freeze_vision must be true; or set lora to null")
    defaults: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": LORA_TARGETS}
    if config.family == "slide_vlm":
        parts = {name: getattr(model.model, name) for name in SEEING_PARTS}
        defaults["modules_to_save"] = [n for n, part in parts.items() if part is not None and list(part.parameters())]
    try:
        return LoraConfig(task_type="CAUSAL_LM", **{**defaults, **config.lora})
    except TypeError as error:
        raise InputError(f"performer.lora: {error}; its keys are those of peft's LoraConfig") from error


def small_text(config: PerformerConfig, tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Keys of the configuration of a small language model from nothing.

    Args:
        tokenizer: gives the size of the vocabulary and its special tokens.
        more: further keys, which go before.
    """
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        # The usual 0.02 is meant for widths in the thousands; here it would leave every layer near zero.
        "initializer_range": config.hidden**-0.5,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **more,
    }


def _tokenizer_for(config: PerformerConfig, cases: list[Case], others: Sequence[str]) -> Any:
    texts = [t for c in cases for t in (question_text(c, config.show_options), c.answer, *(c.options or ()))]
    return train_tokenizer([*texts, *others], config.vocab_size, MARKS_OF.get(config.family, ()))


def _build_qwen(config: PerformerConfig, cases: list[Case], bank: FeatureBank, texts: Sequence[str]) -> QwenPerformer:
    options: dict[str, Any] = {key: getattr(config, key) for key in ASKING}
    if config.pretrained:
        # Small steps would be rounded away in bfloat16 weights; frozen ones may stay in it.
        dtype = torch.float32 if config.lora is None else "auto"
        return QwenPerformer.load(config.pretrained, bank, config.freeze_vision, dtype, **options)
    tokenizer = _tokenizer_for(config, cases, texts)
    model = small_qwen(tokenizer, small_text(config, tokenizer))
    if config.freeze_vision:
        freeze_vision(model)
    return QwenPerformer(model, QwenProcessor(Qwen2VLImageProcessorPil(), tokenizer), bank, **options)


def _build_gemma(
    config: PerformerConfig, cases: list[Case], bank: FeatureBank, texts: Sequence[str]
) -> GemmaPerformer:
    options: dict[str, Any] = {key: getattr(config, key) for key in ASKING}
    if config.pretrained:
        return GemmaPerformer.load(
            config.pretrained, bank, torch.float32 if config.lora is None else "auto", **options
        )
    tokenizer = _tokenizer_for(config, cases, texts)
    return GemmaPerformer(*small_gemma(tokenizer, small_text(config, tokenizer)), bank, **options)


def _build_slide(
    config: PerformerConfig, cases: list[Case], bank: FeatureBank, texts: Sequence[str]
) -> SlidePerformer:
    shared: dict[str, Any] = {"feature_dim": bank.dim, **{key: getattr(config, key) for key in SEEING}}
    if config.language_model:
        tokenizer = load_tokenizer(config.language_model)
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        model = SlideVLM.from_language_model(config.language_model, tokenizer, image_token_id=image_token_id, **shared)
    else:
        tokenizer = _tokenizer_for(config, cases, texts)
        text_config = AutoConfig.for_model("qwen2", **small_text(config, tokenizer))
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        model = SlideVLM(SlideVLMConfig(text_config=text_config, image_token_id=image_token_id, **shared))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    performer = SlidePerformer(model, SlideProcessor(tokenizer), bank, **{key: getattr(config, key) for key in ASKING})
    sources = list(dict.fromkeys(s for c in cases for s in performer.sources(c)))
    step = max(1, len(sources) // 256)
    rows = [bank.see(s, 16).rows[:, :-COLUMNS] for s in sources[::step]]
    model.model.standardise(torch.cat(rows))
    return performer
