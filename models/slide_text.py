"""A Q-Former trained on slides and their texts (PathAlign; BLIP-2's first stage, Li et al. 2023, section 3.2).

One transformer reads the queries, which look at the patches, and the text; a mask per loss says who sees whom. That
PathAlign trains with these losses, heads and masks is inferred (methods 4.2): the paper states the bridge and that
the R variant is contrastive alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings
from transformers.utils import ModelOutput

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import PatchEmbedding, Tokens
from frugalpath.models.compressors.qformer import QFormer

LOSSES = ("itc", "itm", "itg")
"""Contrastive, matching and generation."""
FLOOR = 1e-4
"""Added to every probability that a hard negative is drawn with (BLIP-2's)."""


class SlideTextConfig(PreTrainedConfig):
    """Configuration of `SlideTextModel`.

    Args:
        feature_dim: width of the patch features.
        vocab_size: tokens of the tokenizer; two starts of texts are added to them.
        queries, width, layers, heads, dropout, patches: see `QFormer`.
        text_length: tokens of a text at most, its end token with them.
        shared_width: of the space that slides and texts are compared in.
        initial_temperature: of the contrastive softmax; it is learned.
        losses: those that are trained, of `LOSSES`; `["itc"]` is PathAlign-R.

    Raises:
        InputError: a loss is not known, or there is none.
    """

    model_type = "slide_text"

    def __init__(
        self,
        feature_dim: int = 1280,
        vocab_size: int = 1024,
        queries: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
        patches: int = 10240,
        text_length: int = 128,
        shared_width: int = 256,
        initial_temperature: float = 0.07,
        losses: Sequence[str] = LOSSES,
        **kwargs: Any,
    ):
        if not losses or set(losses) - set(LOSSES):
            raise InputError(f"losses: {list(losses)} is not known; name one or more of {', '.join(LOSSES)}")
        self.feature_dim, self.vocab_size = feature_dim, vocab_size
        self.queries, self.width, self.layers, self.heads = queries, width, layers, heads
        self.dropout, self.patches = dropout, patches
        self.text_length, self.shared_width = text_length, shared_width
        self.initial_temperature = initial_temperature
        self.losses = list(losses)
        self.initializer_range = 0.02 * (768 / width) ** 0.5  # as the Q-Former's
        super().__init__(**kwargs)


class TextQFormer(QFormer):
    """A Q-Former whose transformer has feed-forward layers for text too; all else queries and text share."""

    reads_text = True


@dataclass
class SlideTextOutput(ModelOutput):
    """Output of a training step.

    Args:
        loss: sum of the selected losses.
        itc, itm, itg: each of them, or None.
    """

    loss: torch.Tensor | None = None
    itc: torch.Tensor | None = None
    itm: torch.Tensor | None = None
    itg: torch.Tensor | None = None


def sight(loss: str, queries: int, words: torch.Tensor) -> torch.Tensor:
    """Attention mask of q queries and the t text tokens after them.

    itc: neither side sees the other. itm: all see all. itg: queries see queries; text sees queries and earlier text.

    Args:
        words: (B, t) true where a token is no padding; padding is seen by nobody.

    Returns:
        (B, 1, q + t, q + t) bool: the row sees the column.
    """
    batch, t = words.shape
    see = torch.zeros(queries + t, queries + t, dtype=torch.bool, device=words.device)
    see[:queries, :queries] = True
    see[:queries, queries:] = loss == "itm"
    see[queries:, :queries] = loss != "itc"
    see[queries:, queries:] = True
    if loss == "itg":
        see[queries:, queries:] = see[queries:, queries:].tril()
    seen = torch.cat([words.new_ones(batch, queries, dtype=torch.bool), words.bool()], 1)
    return (see & seen[:, None, :])[:, None]


def similarity(slides: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Largest cosine over a slide's queries: unit vectors (S, K, e) and (T, e) -> (S, T)."""
    return torch.einsum("ske,te->stk", slides, texts).amax(-1)


class SlideTextModel(PreTrainedModel):
    """The Q-Former with its text branch, the projections to the shared space and the heads of the losses."""

    config_class = SlideTextConfig
    base_model_prefix = "slide_text"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SlideTextConfig):
        super().__init__(config)
        width = config.width
        self.qformer = TextQFormer(
            config.feature_dim, config.queries, width, config.layers, config.heads, config.dropout, config.patches
        )
        shape = self.qformer.transformer.config
        # A text starts with one token where it is compared and with another where it is written.
        self.compare, self.write = config.vocab_size, config.vocab_size + 1
        shape.vocab_size, shape.max_position_embeddings = config.vocab_size + 2, config.text_length + 1
        shape.pad_token_id = None
        self.embeddings = Blip2TextEmbeddings(shape)
        self.slide_projection = nn.Linear(width, config.shared_width)
        self.text_projection = nn.Linear(width, config.shared_width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.initial_temperature)))
        if "itm" in config.losses:
            self.itm_head = nn.Linear(width, 1)
        if "itg" in config.losses:
            self.itg_head = nn.Sequential(
                nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, config.vocab_size)
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding | QFormer):
            module.reset()
        elif isinstance(module, Blip2TextEmbeddings):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[-1])[None])
        elif module is self:
            nn.init.constant_(self.log_scale, math.log(1 / self.config.initial_temperature))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    @property
    def scale(self) -> torch.Tensor:
        """Inverse temperature, at most 100 (CLIP's bound, Radford et al. 2021, section 2.5)."""
        return self.log_scale.exp().clamp(max=100.0)

    def embed_slides(self, tokens: Tokens, budget: int | None = None) -> torch.Tensor:
        """Unit vectors (B, K, e) of slides, one a query; K is the number of queries or a smaller budget."""
        seen = self.qformer(tokens, budget or self.qformer.most).features
        return F.normalize(self.slide_projection(seen), dim=-1)

    def embed_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors (B, e) of texts, as `text_batch` gives them."""
        text, words = self._text(self.compare, input_ids, attention_mask)
        seen = self.qformer.transformer(text, query_length=0, attention_mask=_added(sight("itc", 0, words), text))
        return F.normalize(self.text_projection(seen.last_hidden_state[:, 0]), dim=-1)

    def forward(
        self,
        features: torch.Tensor,
        place: torch.Tensor,
        size: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        losses: Sequence[str] | None = None,
    ) -> SlideTextOutput:
        """The losses of B pairs; other pairs of the batch (of this process alone) are the negatives.

        Equal texts are no negatives of each other: in ITC they are matches with an equal share, in ITM they are never
        drawn.

        Args:
            features, place, size: of the slides' `Tokens`.
            input_ids, attention_mask: (B, t) of `text_batch`.
            losses: default those of the configuration.
        """
        asked = self.config.losses if losses is None else losses
        patches, bias = self.qformer.see(Tokens(features, place, size))
        parts: dict[str, torch.Tensor] = {}
        if "itc" in asked or "itm" in asked:
            slides, texts = self._compared(patches, bias, input_ids, attention_mask)
            scores = self.scale * similarity(slides, texts)
            words = input_ids.masked_fill(attention_mask == 0, -1)
            same = (words[:, None] == words).all(-1)
            if "itc" in asked:
                target = same / same.sum(1, keepdim=True)
                parts["itc"] = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
            if "itm" in asked:
                parts["itm"] = self._itm(patches, bias, input_ids, attention_mask, scores.detach(), same)
        if "itg" in asked:
            parts["itg"] = self._itg(patches, bias, input_ids, attention_mask)
        return SlideTextOutput(loss=torch.stack(list(parts.values())).sum(), **parts)

    def _compared(
        self, patches: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self._read("itc", patches, bias, *self._text(self.compare, ids, mask))
        slides, text = seen[:, : self.qformer.most], seen[:, self.qformer.most]
        return (
            F.normalize(self.slide_projection(slides), dim=-1),
            F.normalize(self.text_projection(text), dim=-1),
        )

    def _itm(
        self,
        patches: torch.Tensor,
        bias: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        scores: torch.Tensor,
        same: torch.Tensor,
    ) -> torch.Tensor:
        every = torch.arange(len(ids), device=ids.device)
        own, texts, slides = hard_negatives(scores, same)
        slide_at, text_at = torch.cat([every, own, slides]), torch.cat([every, texts, own])
        text = self._text(self.compare, ids[text_at], mask[text_at])
        seen = self._read("itm", patches[slide_at], bias[slide_at], *text)
        logits = self.itm_head(seen[:, : self.qformer.most]).mean(1)[:, 0]
        match = (torch.arange(len(logits), device=ids.device) < len(ids)).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, match)

    def _itg(self, patches: torch.Tensor, bias: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        text, words = self._text(self.write, ids[:, :-1], mask[:, :-1])
        seen = self._read("itg", patches, bias, text, words)
        logits = self.itg_head(seen[:, self.qformer.most :])
        return F.cross_entropy(logits[mask.bool()], ids[mask.bool()])

    def _read(
        self, loss: str, patches: torch.Tensor, bias: torch.Tensor, text: torch.Tensor, words: torch.Tensor
    ) -> torch.Tensor:
        queries = self.qformer.most
        return self.qformer.read(patches, bias, queries, text, _added(sight(loss, queries, words), text))

    def _text(self, start: int, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, 1 + t, width) of texts after a start token, and where they are no padding."""
        ids = F.pad(ids, (1, 0), value=start)
        return self.embeddings(ids), F.pad(mask.bool(), (1, 0), value=True)


def hard_negatives(scores: torch.Tensor, same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a non-matching text and slide for each pair, more similar ones with higher probability.

    Args:
        scores: (B, B) scaled similarity of slides (rows) and texts. same: (B, B) pairs of equal text.

    Returns:
        The pairs that have any (m,), the texts drawn for their slides (m,) and the slides for their texts (m,).
    """
    own = (~same).any(1).nonzero()[:, 0]
    texts, slides = (
        torch.multinomial((s.softmax(1) + FLOOR).masked_fill(same, 0)[own], 1)[:, 0] if len(own) else own
        for s in (scores, scores.T)
    )
    return own, texts, slides


def text_batch(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, t) of texts, each closed by its end token, right-padded.

    Args:
        tokenizer: of transformers; its end token is `eos_token`, else `sep_token`.
        length: tokens at most; a longer text is cut and closed.

    Raises:
        InputError: the tokenizer has no end token, or a text is empty.
    """
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise InputError("the tokenizer has neither eos_token nor sep_token; set one of them")
    empty = [str(i) for i, text in enumerate(texts) if not text.strip()]
    if empty:
        raise InputError(f"text {', '.join(empty)} (counted from 0) is empty; leave it out or write it")
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([*ids[: length - 1], end]) for ids in found]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=end),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


@torch.no_grad()
def copy_qformer(source: QFormer, target: QFormer) -> None:
    """Give a compressor the weights of a trained Q-Former; what it has for text alone is left out.

    Raises:
        InputError: their shapes differ; the message names the weights.
    """
    state = source.state_dict()
    problems = []
    for key in ("num_hidden_layers", "num_attention_heads"):
        trained, wanted = (getattr(q.transformer.config, key) for q in (source, target))
        if trained != wanted:
            problems.append(f"{key}: {trained} trained, {wanted} wanted")
    for name, weight in target.state_dict().items():
        if name not in state:
            problems.append(f"{name}: not among the trained weights")
        elif state[name].shape != weight.shape:
            problems.append(f"{name}: {tuple(state[name].shape)} trained, {tuple(weight.shape)} wanted")
    if problems:
        told = [f"qformer: {problem}" for problem in problems[:6]]
        if len(problems) > len(told):
            told.append(f"qformer: and {len(problems) - len(told)} more")
        raise InputError(
            [*told, "give the compressor the queries, width, layers, heads and patch encoder of the trained one"]
        )
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def _added(see: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(see, dtype=text.dtype).masked_fill(~see, torch.finfo(text.dtype).min)


AutoConfig.register("slide_text", SlideTextConfig)
AutoModel.register(SlideTextConfig, SlideTextModel)
