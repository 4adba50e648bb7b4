"""Feed visual inputs to a model: visual tokens, their place in the text, and positions.

A `VisualInput` is one image or slide at one budget. A `VisionAdapter` feeds such inputs to one family of models;
everything else (packing, generation, training) is the same for all families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from frugalpath.errors import InputError
from frugalpath.models.feature_bank import VisualTokens
from frugalpath.models.feature_cache import FeatureCache


class VisualInput(Protocol):
    """One image or slide at one budget; `len(view)` is the number of its tokens in the text."""

    def __len__(self) -> int: ...

    @property
    def tokens(self) -> int:
        """Number of visual tokens, in the text or outside it."""
        ...


class VisionAdapter:
    """Feed visual inputs to a family of models.

    Args:
        image_token_id: token of the text that a visual token replaces; None for a text model.
    """

    typed_tokens = False
    """Whether the family's own forward asks for `mm_token_type_ids`."""
    bidirectional = False
    """Whether the image tokens of a view see each other, also those that come later."""
    stock = True
    """Whether the family's stock processor shows a view as it is shown here, so that another engine can write."""

    trained = False
    """Whether a view is seen otherwise when the model has been trained on; `configure` sets it."""

    def __init__(self, image_token_id: int | None):
        self.image_token_id = image_token_id

    def configure(
        self, model: Any, once: bool, cache: FeatureCache | None, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        """Set how a vision tower inside the model runs.

        Args:
            model: the policy. Its reference sees with the same tower where that is frozen.
            once: a frozen tower sees a view once; otherwise it runs inside every forward.
            cache: features that outlive the run.
            autocast: context that the tower runs in.
        """

    def keep_tower(self, model: Any, device: torch.device | None) -> None:
        """See by a copy of the model's frozen vision tower from now on, before its weights are shared out.

        Processes have different images to see, and some have none, while weights that are shared out are gathered by
        all of them together.

        Args:
            device: where the copy stays; None for the model's own tower.
        """

    def view(self, image: Any) -> VisualInput:
        """The view of an image of a training set, made once; a view is returned as it is."""
        raise NotImplementedError

    def check_stock(self, views: Sequence[VisualInput]) -> None:
        """Make sure that the family's stock processor, in another engine, makes as many tokens of the views' images.

        Raises:
            InputError: it would resize one; the message names it and what to change.
        """

    def prefetch(self, views: Sequence[VisualInput]) -> None:
        """Begin to make the views ready on other threads, where that takes work."""

    def fields(self, views: Sequence[VisualInput]) -> dict[str, torch.Tensor]:
        """What the family's processor gives for the views: `pixel_values` and `image_grid_thw`; empty for none."""
        raise NotImplementedError

    def inputs(self, model: Any, shown: Sequence[Sequence[VisualInput]]) -> dict[str, Any]:
        """Arguments of the model's forward that show each row of a batch its views, in the order of their tokens."""
        return dict(self.fields(flat(shown)))

    def typed(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of a forward over whole rows (B, T), under a mask of padding alone, that their token ids give."""
        return {}

    def again(self, out: Any) -> dict[str, Any]:
        """Arguments of the forward over the tokens that follow, from what the one before it gave."""
        return {}

    def positions(self, ids: torch.Tensor, views: Sequence[VisualInput]) -> torch.Tensor:
        """Positions (R, P) of a prompt (P,); R is 1, or 3 for multimodal RoPE."""
        return torch.arange(len(ids))[None]


class TextVisionAdapter(VisionAdapter):
    """Vision adapter of a text model, which has no visual input."""

    def __init__(self) -> None:
        super().__init__(None)

    def view(self, image: Any) -> VisualInput:
        raise InputError("the training set has images, but the model reads text only; use a vision-language model")

    def fields(self, views: Sequence[VisualInput]) -> dict[str, torch.Tensor]:
        return {}


class SlideVisionAdapter(VisionAdapter):
    """Vision adapter of `SlideVLM`; a view is the stored or compressed features of a field or slide."""

    stock = False

    def view(self, image: Any) -> VisualInput:
        if not isinstance(image, VisualTokens):
            raise InputError(
                f"an image of the training set is a {type(image).__name__}; slide_vlm reads stored features: "
                "encode the image first and pass what `FeatureBank.see` gives"
            )
        return image

    def fields(self, views: Sequence[Any]) -> dict[str, torch.Tensor]:
        """As its base.

        Raises:
            InputError: the model makes other tokens of the rows, so that rows alone do not say which are whose.
        """
        if not views:
            return {}
        if any(len(v) != len(v.rows) for v in views):
            raise InputError(
                "a slide_vlm that compresses, marks or routes its tokens is read by our own passes alone: leave "
                "shared_prefix and prefill_once on"
            )
        return {
            "pixel_values": torch.cat([v.rows for v in views]),
            "image_grid_thw": torch.tensor([[1, 1, len(v.rows)] for v in views]),
        }

    def inputs(self, model: Any, shown: Sequence[Sequence[Any]]) -> dict[str, Any]:
        views = flat(shown)
        if not views:
            return {}
        owners = [row for row, own in enumerate(shown) for _ in own]
        table = [[len(v.rows), v.budget, row, v.slide] for v, row in zip(views, owners, strict=True)]
        inputs: dict[str, Any] = {"pixel_values": torch.cat([v.rows for v in views]), "shown": torch.tensor(table)}
        if views[0].question is not None:
            inputs["questions"] = pad_sequence([v.question for v in views], batch_first=True, padding_value=-1)
        return inputs

    def again(self, out: Any) -> dict[str, Any]:
        return {} if out.visual_memory is None else {"visual_memory": out.visual_memory}


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the model reads it.

    Args:
        ids: (P,) token ids; every view has its image tokens.
        views: in the order of their tokens.
        positions: (R, P), see `VisionAdapter.positions`.
    """

    ids: torch.Tensor
    views: tuple[Any, ...]
    positions: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visual(self) -> int:
        """Visual tokens that it costs."""
        return sum(v.tokens for v in self.views)

    @property
    def text(self) -> int:
        """Tokens of the text."""
        return len(self) - sum(map(len, self.views))

    @property
    def next_position(self) -> int:
        """Position of the first token after the prompt."""
        return int(self.positions.max()) + 1


def read_prompt(processor: Any, sight: VisionAdapter, messages: str | Sequence[dict], **template: Any) -> Prompt:
    """Render and tokenize a conversation (or a text) once, its views laid out.

    Args:
        messages: text, or conversation whose image parts hold what `sight.view` takes.
        template: further arguments of `apply_chat_template`.

    Raises:
        InputError: the text has an image token of its own.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    views: tuple[VisualInput, ...] = ()
    if isinstance(messages, str):
        text = messages
    else:
        views = tuple(sight.view(image) for image in images_of(messages))
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **template)
    token = tokenizer.convert_ids_to_tokens(sight.image_token_id) if sight.image_token_id is not None else None
    if token is not None:
        first, *rest = text.split(token)
        if len(rest) != len(views):
            raise InputError(
                f"a prompt has {len(rest)} places for images and {len(views)} images; its text may hold "
                f"{token!r}, which marks an image: remove it"
            )
        text = first + "".join(token * len(v) + part for v, part in zip(views, rest, strict=True))
    if isinstance(messages, str):
        return lay_out(sight, processor(text=[text])["input_ids"][0], ())
    return lay_out(sight, tokenizer(text, add_special_tokens=False)["input_ids"], views)


def lay_out(sight: VisionAdapter, ids: Sequence[int], views: Sequence[VisualInput]) -> Prompt:
    """A prompt from its token ids."""
    row = torch.tensor(ids, dtype=torch.long)
    return Prompt(row, tuple(views), sight.positions(row, views))


def stack_positions(rows: Sequence[torch.Tensor], padding_side: str = "right") -> torch.Tensor:
    """Positions of a batch as a model's forward takes them: (B, T), or (R, B, T) where R is above 1; padding is 0.

    Args:
        rows: B rows, each (R, T_i), see `VisionAdapter.positions`.
    """
    # Sequence first, so that rows of different length can be padded.
    places = pad_sequence([row.T for row in rows], batch_first=True, padding_side=padding_side).permute(2, 0, 1)
    return places[0] if len(places) == 1 else places


def flat(shown: Sequence[Sequence[VisualInput]]) -> list[Any]:
    """The views of all rows, in order."""
    return [view for row in shown for view in row]


def images_of(messages: Sequence[dict]) -> list[Any]:
    """Contents of the image parts of a conversation, in order."""
    parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
    return [p["image"] for p in parts if p["type"] == "image"]
