"""Text and visual tokens of a conversation as model inputs, without torchvision."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from models.tokenizer import IMAGE_TOKEN


class SlideProcessor(ProcessorMixin):
    """Processor of `SlideVLM`: an image is a `VisualTokens`; its place in the text takes one image token per row.

    The tokenizer's chat template sees plain strings, so that the template of any text model serves.
    """

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any):
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize texts and lay out their visual tokens.

        Args:
            images: `VisualTokens`, a list of them, or a list of lists (one a text).
            text: conversation texts with one image token per image.

        Returns:
            `input_ids`, `attention_mask` and, with images, `pixel_values` (rows of all images, d + 3) and
            `image_grid_thw` (images, 3) whose product is the row count of each image.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        visual = {}
        if images is not None:
            flat = [i for group in _listed(images) for i in _listed(group)]
            expected = sum(t.count(self.image_token) for t in texts)
            if expected != len(flat):
                raise ValueError(f"{len(flat)} images for {expected} image places in {len(texts)} texts")
            if flat:
                visual = {
                    "pixel_values": torch.cat([i.rows for i in flat]),
                    "image_grid_thw": torch.tensor([[1, 1, len(i)] for i in flat]),
                }
            counts = iter(len(i) for i in flat)
            texts = [_expand(t, self.image_token, counts) for t in texts]
        passed = {k: v for k, v in kwargs.items() if k in ("padding_side", "max_length", "truncation")}
        out = self.tokenizer(texts, padding=padding, return_tensors=return_tensors, add_special_tokens=False, **passed)
        out.pop("token_type_ids", None)
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
        kwargs = {k: v for k, v in kwargs.items() if k in ("add_generation_prompt", "continue_final_message", "tools")}
        texts = [
            self.tokenizer.apply_chat_template(
                [{**m, "content": self._flatten(m["content"])} for m in messages],
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                **kwargs,
            )
            for messages in conversations
        ]
        if not tokenize:
            return texts[0] if single else texts
        images = [
            [
                part["image"]
                for m in messages
                if not isinstance(m["content"], str)
                for part in m["content"]
                if part["type"] == "image"
            ]
            for messages in conversations
        ]
        out = self(images=images if any(images) else None, text=texts)
        return out if return_dict else out["input_ids"]

    def _flatten(self, content: str | list[dict]) -> str:
        if isinstance(content, str):
            return content
        return "".join(self.image_token if part["type"] == "image" else part["text"] for part in content)


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _expand(text: str, token: str, counts: Any) -> str:
    first, *rest = text.split(token)
    return first + "".join(token * next(counts) + part for part in rest)
