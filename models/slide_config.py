"""Configuration of the vision-language model over stored patch features, see `frugalpath.models.slide_vlm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from frugalpath.errors import InputError
from frugalpath.models.compressors.aligner import MARKERS

FUSIONS = ("prefix", "cross_attention")


class SlideVLMConfig(PreTrainedConfig):
    """Configuration of `SlideVLM`.

    Args:
        text_config: configuration of the causal language model.
        feature_dim: width d of the patch features.
        image_token_id: token that a visual token replaces.
        compressors: names, or mappings of `name` and options, see `frugalpath.models.compressors.chain`.
        aligner: from compressed tokens to embeddings, see `frugalpath.models.compressors.aligner.make_aligner`.
        aligner_width: hidden width of the aligner `place`.
        aligner_dropout: dropout within the aligner.
        markers: what marks the tokens of each slide: none, shared, or unique to its number in the case. A marker
            stands before them in the text; where layers look at them it is added to each, as they have no order there.
        max_slides: slides a case may have with unique markers.
        fusion: `prefix` puts the visual tokens into the text; `cross_attention` lets layers look at them.
        cross_layers: numbers of those layers; null takes three, spread over the model. cross_heads: heads of each
            cross-attention; null takes the language model's.
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
        compressors: Sequence[str | Mapping[str, Any]] = ("pool",),
        aligner: str = "place",
        aligner_width: int = 256,
        aligner_dropout: float = 0.1,
        markers: str = "none",
        max_slides: int = 32,
        fusion: str = "prefix",
        cross_layers: Sequence[int] | None = None,
        cross_heads: int | None = None,
        **kwargs: Any,
    ):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        for key, value, known in (("markers", markers, MARKERS), ("fusion", fusion, FUSIONS)):
            if value not in known:
                raise InputError(f"performer.{key}: {value!r} is unknown; use one of {', '.join(known)}")
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("qwen2")
        self.feature_dim = feature_dim
        self.image_token_id = image_token_id
        self.compressors = list(compressors)
        self.aligner = aligner
        self.aligner_width = aligner_width
        self.aligner_dropout = aligner_dropout
        self.markers = markers
        self.max_slides = max_slides
        self.fusion = fusion
        self.cross_layers = list(cross_layers) if cross_layers is not None else None
        self.cross_heads = cross_heads
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def in_text(self) -> bool:
        """Whether visual tokens stand in the text."""
        return self.fusion == "prefix"

    @property
    def marker_tokens(self) -> int:
        """Tokens that a slide's marker costs."""
        return int(self.in_text and self.markers != "none")
