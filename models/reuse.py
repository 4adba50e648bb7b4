"""Reuse the KV cache of the common beginning of two prompts of a case.

Prompts of one case at two budgets have in common the text before the visual tokens, and the visual tokens up to the
first that differs: all of the smaller budget's where they are nested (`models.compressors.pool`), none where a learned
compressor makes each token of all patches. One measure serves both: equal ids, and equal rows behind image tokens.

Only models that have their visual tokens in the text, as embeddings of stored features, are read on (`resumes`). With
cross-attention every hidden state depends on all visual tokens, and Qwen2.5-VL counts positions in the image's grid:
there each look is a fresh prompt. A prompt that is the same as the one before is not read again by any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from frugalpath.envs.case import Case
from frugalpath.models.attention import check_window, dense_attention
from frugalpath.models.feature_bank import VisualTokens
from frugalpath.models.generation import to_device, write_on
from frugalpath.models.modes import evaluating
from frugalpath.models.performer import Answer, Performer, SlidePerformer
from frugalpath.models.vision_adapter import Prompt, stack_positions


def shared(performer: Performer, before: Prompt, after: Prompt) -> int:
    """Leading tokens of `after` whose keys and values are those of `before`; all of them only if both are the same."""
    views = list(zip(before.views, after.views, strict=False))
    whole = torch.equal(before.ids, after.ids) and len(before.views) == len(after.views)
    if whole and all(performer.alike(a, b) for a, b in views):
        return len(after)
    if not isinstance(performer, SlidePerformer) or not performer.resumes:
        return 0
    n = min(len(before), len(after))
    same = before.ids[:n] == after.ids[:n]
    end = n if same.all() else int(same.int().argmin())
    image = (after.ids == performer.processor.image_token_id).nonzero()[:, 0].tolist()
    at = 0
    for old, new in views:
        start = image[at]
        here = _common(performer, old, new)
        if start >= end or here < max(len(old), len(new)):
            end = min(end, start + here)
            break
        at += len(new)
    return min(end, len(after) - 1)  # the last token gives the logits


def spared(performer: Performer, before: Prompt, after: Prompt) -> float:
    """FLOPs of `after` that the KV cache of `before` saves."""
    kept = shared(performer, before, after)
    if kept == len(after):
        return performer.flops(after, 1)
    if kept == 0:
        return 0.0
    assert isinstance(performer, SlidePerformer)
    seen = performer.seeing(after.views) - performer.seeing([v for v, _ in _rest(performer, after, kept)])
    return performer.shape.read(kept) + seen


def look_flops(performer: Performer, prompts: Sequence[Prompt], generated: Sequence[float]) -> np.ndarray:
    """FLOPs (K + 1, K) of an answer to each of K prompts of a case: row 0 afresh, row 1 + j right after prompt j.

    Args:
        generated: tokens of each answer.
    """
    fresh = np.array([performer.flops(p, g) for p, g in zip(prompts, generated, strict=True)])
    flops = np.tile(fresh, (len(prompts) + 1, 1))
    for j, before in enumerate(prompts):
        for k, after in enumerate(prompts):
            # The answer to the same prompt is the same: it is not written again either.
            again = shared(performer, before, after) == len(after)
            flops[1 + j, k] -= fresh[k] if again else spared(performer, before, after)
    return flops


class Reader:
    """Answers one case at one budget after another; what consecutive prompts begin with is read once."""

    def __init__(self, performer: Performer, case: Case, max_new_tokens: int):
        self.performer, self.case = performer, case
        self.config = performer.greedy(max_new_tokens)
        self._last: tuple[Prompt, Answer, Any] | None = None

    @torch.no_grad()
    def answer(self, budget: int) -> Answer:
        """The greedy answer at a budget; its FLOPs and seconds are those that it took after the looks before it."""
        performer, model = self.performer, self.performer.model
        start = time.perf_counter()
        prompt = performer.prompt(self.case, budget)
        kept, saved, cache = 0, 0.0, None
        if self._last is not None:
            before, answer, old = self._last
            kept = shared(performer, before, prompt)
            if kept == len(prompt):
                return replace(answer, flops=0.0, seconds=time.perf_counter() - start)
            if kept:
                saved, cache = spared(performer, before, prompt), old
        check_window(model, len(prompt) + self.config.max_new_tokens)
        device = model.get_input_embeddings().weight.device
        ids = prompt.ids[None].to(device)
        everything = torch.ones_like(ids)
        with evaluating(model), dense_attention(model):
            out = model(
                attention_mask=everything,
                position_ids=stack_positions([prompt.positions[:, kept:]]).to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **self._inputs(prompt, kept, cache),
            )
            sight = performer.processor.sight
            (((written, logp),),) = write_on(model, sight, [prompt], ids, everything, out, 1, self.config, True)
        flops = performer.flops(prompt, len(written)) - saved
        answer = performer.answered(prompt, written, logp, flops, time.perf_counter() - start)
        self._last = prompt, answer, out.past_key_values
        return answer

    def _inputs(self, prompt: Prompt, kept: int, cache: Any) -> dict[str, Any]:
        """Arguments of the forward over the tokens after the first `kept`, and a cache of just those."""
        performer, model = self.performer, self.performer.model
        if kept == 0:
            shown = performer.processor.sight.inputs(model, [prompt.views])
            ids = prompt.ids[None]
            return to_device({"input_ids": ids, **performer.processor.sight.typed(ids), **shown}, model.device)
        assert isinstance(performer, SlidePerformer)
        cache.crop(kept - cache.get_seq_length())  # negative: so many are taken off
        return {"inputs_embeds": embed(performer, prompt, kept)}


def embed(performer: SlidePerformer, prompt: Prompt, kept: int) -> torch.Tensor:
    """Embeddings (1, P - kept, hidden) of the tokens of a prompt after the first `kept`."""
    model = performer.model
    ids = prompt.ids[kept:].to(model.device)
    embeds = model.get_input_embeddings()(ids)
    parts = _rest(performer, prompt, kept)
    if not parts:
        return embeds[None]
    inputs = to_device(performer.processor.sight.inputs(model, [[v for v, _ in parts]]), model.device)
    blocks = model.model.visual_tokens(inputs["pixel_values"], inputs["shown"], inputs.get("questions"))
    new = torch.cat([block[known:] for block, (_, known) in zip(blocks, parts, strict=True)])
    here = (ids == performer.processor.image_token_id)[:, None]
    return embeds.masked_scatter(here, new.to(embeds.dtype))[None]


def _common(performer: SlidePerformer, before: VisualTokens, after: VisualTokens) -> int:
    """Leading tokens in the text that two views have in common."""
    if performer.alike(before, after):
        return len(after)
    marker = performer.config.marker_tokens
    if performer.chain.learned or (performer.config.markers == "unique" and before.slide != after.slide):
        return 0
    n = min(len(before.rows), len(after.rows))
    same = (before.rows[:n] == after.rows[:n]).all(1)
    return marker + (n if same.all() else int(same.int().argmin()))


def _rest(performer: SlidePerformer, prompt: Prompt, kept: int) -> list[tuple[VisualTokens, int]]:
    """What is left to see after the first `kept` tokens of a prompt.

    Returns:
        Views, of one that is seen in part those rows that are not; and how many of the tokens that such a view gives
        are known already: its marker.
    """
    have = int((prompt.ids[:kept] == performer.processor.image_token_id).sum())
    marker = performer.config.marker_tokens
    found = []
    for view in prompt.views:
        if have <= 0:
            found.append((view, 0))
        elif have < len(view):
            rows = view.rows[have - marker :]
            found.append((replace(view, rows=rows, realised=len(rows) + marker), marker))
        have -= len(view)
    return found
