"""Text and views of a conversation as model inputs, without torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from frugalpath.models.tokenizer import IMAGE_TOKEN
from frugalpath.models.vision_adapter import SlideVisionAdapter, VisionAdapter, images_of


class ViewProcessor(ProcessorMixin):
    """Lays out views in texts: the place of an image takes one image token for each of its visual tokens.

    The tokenizer's chat template sees plain strings, so that the template of any text model serves.
    """

    sight: VisionAdapter
    image_token = IMAGE_TOKEN
    image_text = IMAGE_TOKEN
    """What an image becomes in a text, the image token among it."""

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize texts and lay out their views.

        Args:
            images: what `sight.view` takes, a list of them, or a list of lists (one a text).
            text: conversation texts with one image token per image.

        Returns:
            `input_ids`, `attention_mask`, what `sight.fields` gives and, if the family wants them,
            `mm_token_type_ids` (1 for an image token).
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        visual: dict[str, torch.Tensor] = {}
        if images is not None:
            views = [self.sight.view(i) for group in _listed(images) for i in _listed(group) if i is not None]
            expected = sum(t.count(self.image_token) for t in texts)
            if expected != len(views):
                raise ValueError(f"{len(views)} images for {expected} image places in {len(texts)} texts")
            visual = self.sight.fields(views)
            counts = iter(len(v) for v in views)
            texts = [_expand(t, self.image_token, counts) for t in texts]
        passed = {k: v for k, v in kwargs.items() if k in ("padding_side", "max_length", "truncation")}
        out = self.tokenizer(texts, padding=padding, return_tensors=return_tensors, add_special_tokens=False, **passed)
        out.pop("token_type_ids", None)
        if self.sight.typed_tokens:
            out["mm_token_type_ids"] = token_types(out["input_ids"], self.image_token_id)
        return BatchFeature({**out, **visual}, tensor_type=None)

    def apply_chat_template(
        self,
        conversation: list,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation or several; with `tokenize` their images are laid out too."""
        single = isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        texts = [
            self._rendered(
                self.tokenizer.apply_chat_template(
                    [{**m, "content": self._flatten(m["content"])} for m in messages],
                    chat_template=chat_template or self.chat_template,
                    tokenize=False,
                    **kwargs,
                )
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts[0] if single else texts
        images = [images_of(messages) for messages in conversations]
        out = self(images=images if any(images) else None, text=texts)
        return out if return_dict else out["input_ids"]

    def _rendered(self, text: str) -> str:
        """What becomes of a rendered conversation."""
        return text

    def _flatten(self, content: str | list[dict]) -> str:
        if isinstance(content, str):
            return content
        return "".join(self.image_text if part["type"] == "image" else part["text"] for part in content)


class SlideProcessor(ViewProcessor):
    """Processor of `SlideVLM`: an image is a `VisualTokens`."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any):
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.sight = SlideVisionAdapter(self.image_token_id)
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)


class TowerProcessor(ViewProcessor):
    """Processor of a family with a vision tower of its own, which needs no torchvision."""

    attributes = ("image_processor", "tokenizer")
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write the stock parts, so that any tool reads the folder."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def token_types(ids: Any, image_token_id: int | None) -> Any:
    """1 for an image token, else 0: of a tensor, or of lists of token ids."""
    if isinstance(ids, torch.Tensor):
        return (ids == image_token_id).long()
    return [[int(t == image_token_id) for t in row] for row in ids]


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _expand(text: str, token: str, counts: Any) -> str:
    first, *rest = text.split(token)
    return first + "".join(token * next(counts) + part for part in rest)
