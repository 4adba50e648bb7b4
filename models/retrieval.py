"""Index of slides and their texts that can be saved and searched both ways.

Classes by their descriptions: a slide belongs to the class whose prompts it resembles most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from frugalpath.errors import InputError
from frugalpath.files import atomic_write, write_text
from frugalpath.models.compressors.base import PLACE, Tokens
from frugalpath.models.feature_bank import COLUMNS, patch_rows
from frugalpath.models.feature_cache import module_revision
from frugalpath.models.slide_text import SlideTextModel, similarity, text_batch
from frugalpath.slides.store import Features

INDEX, VECTORS = "index.json", "vectors.safetensors"


def slide_rows(stored: Features) -> torch.Tensor:
    """Stored features as rows of learned compressors (n, d + 4): features, place as shares of the slide, size 1."""
    rows, scale = patch_rows(stored)
    rows[:, -COLUMNS:] /= scale
    return rows


class Embedder:
    """Embed slides and texts with a trained `SlideTextModel`.

    Args:
        folder: where they were read from, or None.
    """

    def __init__(self, model: SlideTextModel, tokenizer: Any, folder: str | Path | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.folder = None if folder is None else Path(folder).absolute()
        self.revision = module_revision(model)

    @classmethod
    def load(cls, folder: str | Path) -> Embedder:
        """From a folder that holds the model and its tokenizer.

        Raises:
            InputError: it holds no such model.
        """
        if not (Path(folder) / "config.json").is_file():
            raise InputError(f"{folder}: no config.json; name the folder of a trained slide-text model")
        kind = AutoConfig.from_pretrained(folder).model_type
        if kind != "slide_text":
            raise InputError(f"{folder}: a model of the kind {kind}; name the folder of a trained slide-text model")
        return cls(SlideTextModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder)

    @torch.no_grad()
    def slides(self, rows: Sequence[torch.Tensor], batch_size: int = 16) -> torch.Tensor:
        """Unit vectors (N, K, e) of slides, given as rows (n_i, d + 4).

        Raises:
            InputError: features of another width than the model's, or a slide without patches.
        """
        width = self.model.config.feature_dim
        found = [torch.empty(0, self.model.config.queries, self.model.config.shared_width)]
        for at in range(0, len(rows), batch_size):
            chunk = [rows[i] for i in range(at, min(at + batch_size, len(rows)))]
            for i, slide in enumerate(chunk, at):
                if slide.shape[1] - PLACE - 1 != width:
                    raise InputError(
                        f"slide {i} (from 0): its features have width {slide.shape[1] - PLACE - 1}, the model reads "
                        f"{width}; extract it with the patch encoder that the model was trained with"
                    )
                if not len(slide):
                    raise InputError(f"slide {i} (from 0): no patches; leave it out, or check its tissue mask")
            tokens = Tokens.from_rows([slide.to(self.model.device) for slide in chunk])
            found.append(self.model.embed_slides(tokens).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Unit vectors (T, e) of texts.

        Raises:
            InputError: a text is empty.
        """
        found = [torch.empty(0, self.model.config.shared_width)]
        for at in range(0, len(texts), batch_size):
            inputs = text_batch(self.tokenizer, texts[at : at + batch_size], self.model.config.text_length)
            vectors = self.model.embed_texts(**{k: v.to(self.model.device) for k, v in inputs.items()})
            found.append(vectors.float().cpu())
        return torch.cat(found)


@dataclass(frozen=True)
class Item:
    """Entry of a slide in an index.

    Args:
        id: unique name. patient: of the slide, for intervals. text: its report, or None.
    """

    id: str
    patient: str
    text: str | None = None


class RetrievalIndex:
    """Embedded slides and the distinct texts among theirs.

    Args:
        embedder: what they are embedded with.
        items: the slides; slides: their vectors (N, K, e).
        texts: vectors (D, e) of the distinct texts, in the order in which the items have them first.
        encoder: patch encoder of the features, where they state one.
    """

    def __init__(
        self,
        embedder: Embedder,
        items: Sequence[Item],
        slides: torch.Tensor,
        texts: torch.Tensor,
        encoder: str | None = None,
    ):
        self.embedder, self.items, self.encoder = embedder, list(items), encoder
        self.slide_vectors, self.text_vectors = slides, texts
        self.texts = distinct(items)

    @classmethod
    def build(
        cls, embedder: Embedder, items: Sequence[Item], rows: Sequence[torch.Tensor], encoder: str | None = None
    ) -> RetrievalIndex:
        """Embed slides, given as rows (n_i, d + 4), and their texts.

        Raises:
            InputError: no slide, an id that stands twice, or features of another width than the model's.
        """
        ids = [item.id for item in items]
        twice = sorted({name for name in ids if ids.count(name) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise InputError(f"index: the id {twice[0]!r} occurs more than once; ids must be unique")
        if not items:
            raise InputError("index: there are no slides to add")
        return cls(embedder, items, embedder.slides(rows), embedder.texts(distinct(items)), encoder)

    def query_text(self, text: str, k: int = 5) -> list[dict[str, Any]]:
        """The k slides that best match a text: rank, score (cosine), id, patient, text."""
        scores = similarity(self.slide_vectors, self.embedder.texts([text]))[:, 0]
        return [
            {"rank": rank, "score": score, **asdict(self.items[at])} for rank, score, at in _best(scores, _checked(k))
        ]

    def query_slide(self, rows: torch.Tensor, k: int = 5) -> list[dict[str, Any]]:
        """The k distinct texts that best match a slide (n, d + 4): rank, score (cosine), text, ids of its slides."""
        if not self.texts:
            raise InputError("index: none of its slides has a text, so a slide has no match; build it with texts")
        scores = similarity(self.embedder.slides([rows]), self.text_vectors)[0]
        return [
            {
                "rank": rank,
                "score": score,
                "text": self.texts[at],
                "ids": [item.id for item in self.items if item.text == self.texts[at]],
            }
            for rank, score, at in _best(scores, _checked(k))
        ]

    def pairs(self) -> tuple[np.ndarray, list[Item]]:
        """Similarity (N, N) of the slides that have a text with the texts of all of them, and those slides."""
        at = [i for i, item in enumerate(self.items) if item.text is not None]
        number = {text: i for i, text in enumerate(self.texts)}
        having = [self.items[i] for i in at]
        scores = similarity(self.slide_vectors[at], self.text_vectors)
        return scores[:, [number[str(item.text)] for item in having]].numpy(), having

    def save(self, folder: str | Path) -> None:
        """Write `index.json` and `vectors.safetensors`; the model stays where it is and is named.

        Raises:
            InputError: the model has no folder.
        """
        if self.embedder.folder is None:
            raise InputError("index: its model was never saved; save model and tokenizer, and load an Embedder")
        folder = Path(folder)
        with atomic_write(folder / VECTORS) as part:
            save_file({"slides": self.slide_vectors.contiguous(), "texts": self.text_vectors.contiguous()}, part)
        known = {
            "model": str(self.embedder.folder),
            "revision": self.embedder.revision,
            "encoder": self.encoder,
            "items": [asdict(item) for item in self.items],
        }
        write_text(folder / INDEX, json.dumps(known, ensure_ascii=False, indent=1))

    @classmethod
    def load(cls, folder: str | Path, model: str | Path | None = None) -> RetrievalIndex:
        """Load what `save` wrote.

        Args:
            model: folder of the model, where it has moved.

        Raises:
            InputError: a file is missing or damaged, or the model is not the one that the vectors are of.
        """
        folder = Path(folder)
        try:
            known = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            vectors = load_file(folder / VECTORS)
            items = [Item(**item) for item in known["items"]]
            slides, texts = vectors["slides"], vectors["texts"]
            if (len(slides), len(texts)) != (len(items), len(distinct(items))):
                raise InputError(f"{folder}: {VECTORS} does not belong to this {INDEX}; build the index again")
        except FileNotFoundError as error:
            raise InputError(f"{error.filename}: no such file; name the folder of an index") from error
        except (json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: damaged ({error}); build the index again") from error
        embedder = Embedder.load(model or known["model"])
        if embedder.revision != known["revision"]:
            raise InputError(
                f"{folder}: its vectors are of the model {known['revision']}, {embedder.folder} holds "
                f"{embedder.revision}; build the index again, or name the model that it was built with"
            )
        return cls(embedder, items, slides, texts, known["encoder"])


def distinct(items: Sequence[Item]) -> list[str]:
    """The texts of items, each once, in the order of their first."""
    return list(dict.fromkeys(item.text for item in items if item.text is not None))


def _checked(k: int) -> int:
    if k < 1:
        raise InputError(f"k is {k}; give at least 1")
    return k


def _best(scores: torch.Tensor, k: int) -> list[tuple[int, float, int]]:
    order = scores.argsort(descending=True, stable=True)[:k]
    return [(rank, float(scores[at]), int(at)) for rank, at in enumerate(order, 1)]


def class_vectors(embedder: Embedder, prompts: Mapping[str, Sequence[str]]) -> torch.Tensor:
    """Unit vectors (C, e): of each class the normalised mean of its prompts' (CLIP, Radford et al. 2021, 3.1.4).

    Raises:
        InputError: fewer than two classes, or a class without prompts or with an empty one.
    """
    problems = [] if len(prompts) > 1 else ["prompts: fewer than two classes; name what a slide may be"]
    for name, texts in prompts.items():
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            problems.append(f"prompts: class {name!r} needs a list of texts, none of them empty")
    if problems:
        raise InputError(problems)
    return F.normalize(torch.stack([embedder.texts(list(texts)).mean(0) for texts in prompts.values()]), dim=-1)


@torch.no_grad()
def class_probabilities(embedder: Embedder, slides: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Softmax (N, C), at the learned temperature, of slides' vectors (N, K, e) over classes (C, e)."""
    return (similarity(slides, classes) * embedder.model.scale.float().cpu()).softmax(1)
