"""Qwen2.5-VL, whose frozen vision tower sees each (image, budget) once in a run.

Its features are kept with the view and, if wanted, on disk. Works without torchvision; loads by `from_pretrained` or
is made from a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from frugalpath.errors import InputError
from frugalpath.models.adapters import read_merged
from frugalpath.models.feature_cache import FeatureCache, cache_key, content_hash
from frugalpath.models.image_view import ImageView, fit, open_image
from frugalpath.models.processor import TowerProcessor
from frugalpath.models.vision_adapter import VisualInput, flat
from frugalpath.models.vision_tower import TowerVisionAdapter, holder_of, is_frozen, takes_features

VISION_MARKS = ("<|vision_start|>", "<|vision_end|>")
VIDEO_TOKEN = "<|video_pad|>"
"""No video is shown, but the stock processor and vLLM look it up."""
SPECIAL = (*VISION_MARKS, VIDEO_TOKEN)
"""What a tokenizer of Qwen2.5-VL has beside the tokens of all families."""
TOWER_PATCHES = 32768
"""Patches that the vision tower reads at a time."""


class QwenVisionAdapter(TowerVisionAdapter):
    """Vision adapter of Qwen2.5-VL; a frozen tower sees each view once, unless `configure` changes that."""

    typed_tokens = True
    parts = ("visual",)

    def configure(
        self, model: Any, once: bool, cache: FeatureCache | None, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        tower = self.eyes(model).visual
        self.trained = not is_frozen(tower)
        self._keep(once and not self.trained, cache, autocast, [tower], tower.patch_embed.proj.weight)

    @property
    def unit(self) -> int:
        """Side in px of the square that is one token."""
        return self.processor.patch_size * self.processor.merge_size

    def view(self, image: Any) -> VisualInput:
        """The view of an image as the image processor would resize it."""
        if isinstance(image, ImageView):
            return image
        if isinstance(image, (str, Path)):
            # Not held open: a training set has more files than a process may open.
            image = str(image)
            with open_image(image) as file:
                width, height = file.size
        elif isinstance(image, Image.Image):
            width, height = image.size
        else:
            raise InputError(f"an image of the training set is a {type(image).__name__}; give a PIL image or a path")
        size = self.processor.size
        try:
            height, width = smart_resize(height, width, self.unit, size["shortest_edge"], size["longest_edge"])
        except ValueError as error:
            name = image if isinstance(image, str) else "an image of the training set"
            raise InputError(f"{name}: {error}; crop the image") from error
        return self._view(image, height, width, None, None)

    def view_at(self, path: str, budget: int) -> ImageView:
        """The view of an image file at a budget of at least 1 token.

        Raises:
            InputError: not an image, or more than 200 times as long as wide; the message names the file.
        """
        with open_image(path) as file:
            width, height = file.size
        try:
            rows, columns = fit(height, width, budget, self.unit)
        except ValueError as error:
            raise InputError(f"{path}: {error}; crop the image") from error
        size = (columns * self.unit, rows * self.unit)
        return self._view(path, size[1], size[0], size, budget)

    def check_stock(self, views: Sequence[VisualInput]) -> None:
        area, size = self.unit**2, self.processor.size
        for view in views:
            assert isinstance(view, ImageView)
            if view.resize is None:
                continue  # its size comes from the same limits
            width, height = view.resize
            tall, wide = smart_resize(height, width, self.unit, size["shortest_edge"], size["longest_edge"])
            if (tall, wide) != (height, width):
                name = view.source if isinstance(view.source, str) else "an image of the training set"
                raise InputError(
                    f"{name}: shown with {len(view)} tokens, but the checkpoint's image processor, which vLLM runs, "
                    f"makes {tall * wide // area} of them, as its limits are {size['shortest_edge'] / area:g} and "
                    f"{size['longest_edge'] / area:g} tokens of {self.unit} x {self.unit} px; show it larger, or "
                    "change `size` in preprocessor_config.json of a local copy of the checkpoint (shortest_edge: "
                    f"{area} allows one token)"
                )

    def fields(self, views: Sequence[Any]) -> dict[str, torch.Tensor]:
        if not views:
            return {}
        self.prefetch(views)
        waiting = [v.job.result() if v.job is not None else None for v in views]
        # Where features were found nobody has cut up the image yet.
        again = {
            v: self.pool.submit(self._patches, v) for v, found in zip(views, waiting, strict=True) if found is None
        }
        rows = [again[v].result() if found is None else found for v, found in zip(views, waiting, strict=True)]
        return {"pixel_values": torch.cat(rows), "image_grid_thw": _grids(views)}

    def inputs(self, model: Any, shown: Sequence[Sequence[Any]]) -> dict[str, Any]:
        base, views = backbone(model), flat(shown)
        if not views or not self.once or not takes_features(base):
            return dict(self.fields(views))
        if any(v.features is None for v in views):
            if not is_frozen(base.visual):
                return dict(self.fields(views))
            self.see(self.eyes(base), views)
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[v.features for v in views])}}

    @torch.no_grad()
    def see(self, base: Any, views: Sequence[ImageView]) -> None:
        """Give every view its features (n, hidden): what was seen before, in memory or on disk, else by the tower."""
        self.prefetch(views)
        for view in views:
            if view.job is not None:
                view.job.result()
        device = base.visual.patch_embed.proj.weight.device
        for chunk in _chunks(list(dict.fromkeys(v for v in views if v.features is None))):
            fields = {k: x.to(device) for k, x in self.fields(chunk).items()}
            with self.autocast():
                out = base.get_image_features(fields["pixel_values"], fields["image_grid_thw"], return_dict=True)
            for view, features in zip(chunk, out.pooler_output, strict=True):
                # Its own memory: a slice would keep the features of the whole batch alive.
                view.features, view.job = features.clone(), None
                self.seen += 1
                self._hold(view.key, view.features)
                if self.cache is not None:
                    self.cache.put(view.key, features)

    def positions(self, ids: torch.Tensor, views: Sequence[Any]) -> torch.Tensor:
        """Multimodal RoPE (Qwen2-VL, section 2.1): text counts on, an image lies on a grid of time, height, width."""
        places, at, text = [], 0, 0
        is_image = ids == self.image_token_id
        grids = iter((v.grid, v.merge) for v in views)
        while at < len(ids):
            if not is_image[at]:
                end = at + int((torch.cat([is_image[at:], is_image.new_ones(1)]).int()).argmax())
                places.append(torch.arange(text, text + end - at).expand(3, -1))
                text += end - at
            else:
                (t, h, w), merge = next(grids)
                axes = torch.meshgrid(*(torch.arange(n) for n in (t, h // merge, w // merge)), indexing="ij")
                places.append(torch.stack(axes).reshape(3, -1) + text)
                end = at + t * h * w // merge**2
                text += max(h, w) // merge
            at = end
        return torch.cat(places, 1)

    def _view(
        self, source: Any, height: int, width: int, resize: tuple[int, int] | None, budget: int | None
    ) -> ImageView:
        patch = self.processor.patch_size
        return ImageView(source, (1, height // patch, width // patch), self.processor.merge_size, resize, budget)

    def _patches(self, view: ImageView) -> torch.Tensor:
        out = self.processor(images=[view.image()], return_tensors="pt", do_resize=view.resize is None)
        if tuple(out["image_grid_thw"][0].tolist()) != view.grid:
            raise InputError(
                f"{view.source}: {len(view)} visual tokens were counted, but the image processor made a grid of "
                f"{out['image_grid_thw'][0].tolist()} patches; its `size` was changed after the prompt was made"
            )
        return out["pixel_values"]

    def _ready(self, view: ImageView) -> torch.Tensor | None:
        """Patches of a view, or None where its features are there already."""
        if self.once:
            kind = "own" if view.resize else "processor"
            view.key = cache_key(content_hash(view.source), view.grid, f"{self._revision}-{kind}")
            view.features = self._found(view.key)
            if view.features is not None:
                return None
        return self._patches(view)


class QwenProcessor(TowerProcessor):
    """Processor of Qwen2.5-VL that needs neither torchvision nor a video processor.

    Args:
        image_processor: a `Qwen2VLImageProcessorPil`; its `size` limits images that come without a budget.
    """

    sight: QwenVisionAdapter

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        # Without marks between them two images side by side would be one to the model.
        self.image_text = self.image_token.join(VISION_MARKS)
        self.sight = QwenVisionAdapter(self.image_token_id, image_processor)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def load(cls, folder: str | Path) -> QwenProcessor:
        """From a folder or a name that `from_pretrained` takes."""
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        return cls(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer)


def backbone(model: Any) -> Any:
    """The `Qwen2_5_VLModel` within wrappers of training and adapters."""
    return holder_of(model, "visual")


def freeze_vision(model: Any) -> None:
    """Exclude the vision tower from training."""
    backbone(model).visual.requires_grad_(False)


def load_qwen(name: str | Path, **options: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Load a Qwen2.5-VL; an adapter is merged into its base."""
    return read_merged(Qwen2_5_VLForConditionalGeneration, name, **options)


def small_qwen(
    tokenizer: Any, text: dict[str, Any], vision: dict[str, Any] | None = None, attention: str = "sdpa"
) -> Qwen2_5_VLForConditionalGeneration:
    """Build an untrained Qwen2.5-VL.

    Args:
        tokenizer: with `SPECIAL`.
        text: keys of its text configuration. vision: keys of its vision configuration; widths and depth follow the
            language model's where they are not given.
    """
    width, heads = text["hidden_size"], text["num_attention_heads"]
    half = width // heads // 2
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2],
    }
    depth = text["num_hidden_layers"]
    tower = {
        "hidden_size": width,
        "intermediate_size": text["intermediate_size"],
        "depth": depth,
        "num_heads": heads,
        "fullatt_block_indexes": [depth - 1],
        "initializer_range": text.get("initializer_range", 0.02),
        **(vision or {}),
    }
    image, start, end, video = tokenizer.convert_tokens_to_ids([TowerProcessor.image_token, *SPECIAL])
    config = Qwen2_5_VLConfig(
        text_config={"rope_parameters": rope, **text},
        vision_config={**tower, "out_hidden_size": width},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _grids(views: Sequence[ImageView]) -> torch.Tensor:
    return torch.tensor([v.grid for v in views])


def _chunks(views: Sequence[ImageView]) -> Iterator[list[ImageView]]:
    chunk: list[ImageView] = []
    patches = 0
    for view in views:
        size = view.grid[0] * view.grid[1] * view.grid[2]
        if chunk and patches + size > TOWER_PATCHES:
            yield chunk
            chunk, patches = [], 0
        chunk.append(view)
        patches += size
    if chunk:
        yield chunk
