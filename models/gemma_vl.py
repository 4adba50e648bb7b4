"""Gemma 3 (MedGemma), which sees a square of fixed size: the grid of its tokens is pooled to the budget.

The frozen vision tower reads an image once, whatever the budgets; its grid of projected tokens (16 x 16) is kept in
memory and, if wanted, on disk. Image tokens of one view see each other, also those that come later. Works without
torchvision; loads by `from_pretrained` or is made from a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from frugalpath.errors import InputError
from frugalpath.models.adapters import read_merged
from frugalpath.models.cost import SquareTowerShape
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.models.feature_cache import FeatureCache, cache_key, content_hash
from frugalpath.models.image_view import ImageView
from frugalpath.models.performer import ImagePerformer
from frugalpath.models.processor import TowerProcessor
from frugalpath.models.vision_adapter import VisualInput, flat
from frugalpath.models.vision_tower import TowerVisionAdapter, holder_of, is_frozen, takes_features

START, SOFT, END = MARKS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
TOWER_IMAGES = 16
"""Images that the vision tower reads at a time."""


class GemmaVisionAdapter(TowerVisionAdapter):
    """Vision adapter of Gemma 3 with a frozen vision tower.

    Args:
        side: of the grid of tokens that the model makes of an image.
    """

    bidirectional = True
    stock = False
    parts = ("vision_tower", "multi_modal_projector")

    def __init__(self, image_token_id: int, image_processor: Any, side: int):
        super().__init__(image_token_id, image_processor)
        self.side = side

    def configure(
        self, model: Any, once: bool, cache: FeatureCache | None, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        """As its base.

        Raises:
            InputError: the vision tower is trained, or this transformers hands Gemma 3 no ready features.
        """
        base = self.eyes(model)
        if not all(map(is_frozen, vision_parts(base))):
            raise InputError("gemma_vl needs a frozen vision tower: call `freeze_gemma` on the model first")
        _require_features(base)
        parts = vision_parts(base)
        self._keep(once, cache, autocast, parts, parts[1].mm_input_projection_weight)

    def view(self, image: Any) -> VisualInput:
        """The view of an image with all its tokens."""
        return image if isinstance(image, ImageView) else self.view_at(image, self.side**2)

    def view_at(self, source: Any, budget: int) -> ImageView:
        """The view of an image at a budget of at least 1 token: the largest square of tokens within it."""
        side = min(self.side, math.isqrt(budget))
        return ImageView(source, (1, side, side), 1, None, budget)

    def fields(self, views: Sequence[VisualInput]) -> dict[str, torch.Tensor]:
        """As its base.

        Raises:
            InputError: there are views, and the stock processor knows no pooled ones.
        """
        if views:
            raise InputError(
                "gemma_vl pools its image tokens to the budget, which only our own passes do: leave shared_prefix and "
                "prefill_once on, and use_vllm off"
            )
        return {}

    def typed(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": (ids == self.image_token_id).long()}

    def inputs(self, model: Any, shown: Sequence[Sequence[Any]]) -> dict[str, Any]:
        views = flat(shown)
        if not views:
            return {}
        _require_features(gemma_backbone(model))
        if not self.once or any(v.features is None for v in views):
            self.see(self.eyes(model), views)
        tokens = torch.cat([v.features for v in views])
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens[None])}}

    @torch.no_grad()
    def see(self, base: Any, views: Sequence[ImageView]) -> None:
        """Give every view its features (n, hidden), pooled from the grid of its image; the tower reads new images."""
        if not self.once:
            for view in views:
                view.features = view.job = None
        self.prefetch(views)
        grids: dict[str, torch.Tensor] = {}
        unseen: dict[str, torch.Tensor] = {}
        for view in (v for v in views if v.features is None):
            assert view.job is not None
            pixels, grid = view.job.result()
            grid = self._found(view.key) if grid is None else grid  # seen for another view meanwhile
            if grid is None:
                unseen.setdefault(view.key, pixels)
            else:
                grids[view.key] = grid
        weight = base.multi_modal_projector.mm_input_projection_weight
        for keys in _chunks(unseen):
            pixels = torch.stack([unseen[key] for key in keys]).to(weight.device)
            with self.autocast():
                out = base.get_image_features(pixels.to(weight.dtype), return_dict=True).pooler_output
            for key, grid in zip(keys, out, strict=True):
                # Its own memory: a slice would keep the features of the whole batch alive.
                grids[key] = grid.clone()
                self.seen += 1
                self._hold(key, grids[key])
                if self.once and self.cache is not None:
                    self.cache.put(key, grids[key])
        for view in (v for v in views if v.features is None):
            view.features, view.job = self._pooled(grids[view.key], view.grid[1]), None

    def _pooled(self, grid: torch.Tensor, side: int) -> torch.Tensor:
        """A grid (side², hidden) as the means of `side` x `side` of its regions."""
        if side == self.side:
            return grid
        plane = grid.T.reshape(1, -1, self.side, self.side).float()
        return F.adaptive_avg_pool2d(plane, side).flatten(2)[0].T.contiguous().to(grid.dtype)

    def _ready(self, view: ImageView) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Pixels (3, height, width) of a view's image, or its grid where that is there already."""
        view.key = cache_key(content_hash(view.source), (1, self.side, self.side), self._revision)
        grid = self._found(view.key)
        if grid is not None:
            return None, grid
        return self.processor(images=[view.image()], return_tensors="pt")["pixel_values"][0], None


class GemmaProcessor(TowerProcessor):
    """Processor of Gemma 3 that needs no torchvision.

    Args:
        image_processor: a `Gemma3ImageProcessorPil`. side: see `GemmaVisionAdapter`.
    """

    sight: GemmaVisionAdapter
    image_token = SOFT
    image_text = START

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, side: int = 16, chat_template: str | None = None
    ):
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.sight = GemmaVisionAdapter(self.image_token_id, image_processor, side)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def _rendered(self, text: str) -> str:
        # After the template, as in the stock processor: the template strips what stands around a message.
        return text.replace(START, f"\n\n{START}{SOFT}{END}\n\n")


class GemmaPerformer(ImagePerformer):
    """Performer based on Gemma 3, which sees the image itself, its tokens pooled to the budget."""

    family = "gemma_vl"
    processor: GemmaProcessor

    def seeing(self, views: Sequence[VisualInput]) -> float:
        config = self.model.config
        tower = SquareTowerShape.from_config(config.vision_config, config.mm_tokens_per_image)
        return len(views) * tower.read(config.get_text_config().hidden_size)

    @classmethod
    def load(
        cls, folder: str | Path, bank: FeatureBank, dtype: torch.dtype | str = "auto", **options: Any
    ) -> GemmaPerformer:
        """From a folder that `save` wrote, or anything that `from_pretrained` takes.

        Args:
            dtype: of the weights; "auto" keeps what was saved.
        """
        model = load_gemma(folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        side = math.isqrt(model.config.mm_tokens_per_image)
        return cls(
            model, GemmaProcessor(Gemma3ImageProcessorPil.from_pretrained(folder), tokenizer, side), bank, **options
        )


def gemma_backbone(model: Any) -> Any:
    """The `Gemma3Model` within wrappers of training and adapters."""
    return holder_of(model, "vision_tower")


def vision_parts(base: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What makes an image's grid of tokens: the tower and the projector."""
    return base.vision_tower, base.multi_modal_projector


def freeze_gemma(model: Any) -> Any:
    """Exclude the vision tower and its projector from training; returns the model."""
    for part in vision_parts(gemma_backbone(model)):
        part.requires_grad_(False)
    return model


def load_gemma(name: str | Path, **options: Any) -> Gemma3ForConditionalGeneration:
    """Load a Gemma 3 with a frozen vision tower; an adapter is merged into its base."""
    return freeze_gemma(read_merged(Gemma3ForConditionalGeneration, name, **options))


def small_gemma(
    tokenizer: Any, text: dict[str, Any], vision: dict[str, Any] | None = None, attention: str = "sdpa"
) -> tuple[Gemma3ForConditionalGeneration, GemmaProcessor]:
    """Build an untrained Gemma 3, which sees 128 x 128 px as 8 x 8 tokens, and its processor.

    Args:
        tokenizer: with `MARKS`.
        text: keys of its text configuration. vision: keys of its vision configuration; widths and depth follow the
            language model's where they are not given.
    """
    tower = {
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_hidden_layers": text["num_hidden_layers"],
        "num_attention_heads": text["num_attention_heads"],
        "image_size": 128,
        "patch_size": 8,
        "vision_use_head": False,
        **(vision or {}),
    }
    start, image, end = tokenizer.convert_tokens_to_ids(list(MARKS))
    config = Gemma3Config(
        text_config={
            "head_dim": text["hidden_size"] // text["num_attention_heads"],
            "query_pre_attn_scalar": text["hidden_size"] // text["num_attention_heads"],
            **text,
        },
        vision_config={"model_type": "siglip_vision_model", **tower},
        mm_tokens_per_image=64,
        image_token_index=image,
        boi_token_index=start,
        eoi_token_index=end,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention)
    # It is made of zeros, so that no image would be told from another.
    std = text.get("initializer_range", 0.02)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=std)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    size = {"height": tower["image_size"], "width": tower["image_size"]}
    return freeze_gemma(model), GemmaProcessor(Gemma3ImageProcessorPil(size=size), tokenizer, 8)


def _chunks(keys: Iterable[str]) -> list[list[str]]:
    listed = list(keys)
    return [listed[at : at + TOWER_IMAGES] for at in range(0, len(listed), TOWER_IMAGES)]


def _require_features(base: Any) -> None:
    """Raise InputError if the model's forward would ignore precomputed features.

    Raises:
        InputError: transformers is older than 5.18.
    """
    if not takes_features(base):
        raise InputError(
            "gemma_vl: this transformers takes no precomputed features for Gemma 3; pip install -U transformers"
        )
