"""Trace the memory of training steps and generation as a recipe runs them; see `frugalpath.doctor.ledger`.

The language model is traced with two and three layers; the difference is the memory of each further layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import DynamicCache

from frugalpath.doctor.kernels import GPU, score
from frugalpath.doctor.ledger import Ledger, Trace
from frugalpath.doctor.subject import Subject
from frugalpath.models.attention import SHARED_PREFIX, as_mask
from frugalpath.models.build import lora_config
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.cross_attention import MEMORY, decoder_layers
from frugalpath.models.feature_bank import COLUMNS
from frugalpath.models.gemma_vl import TOWER_IMAGES
from frugalpath.models.qwen_vl import TOWER_PATCHES
from frugalpath.rl.packing import block_mask
from frugalpath.sft.supervised import part_of

DEPTH = 2
"""Layers of the shorter traced model."""


_TRACED: dict[str, Trace] = {}


@dataclass(frozen=True)
class Seen:
    """Visual input of a prompt.

    Args:
        tokens: visual tokens of a prompt. patches: rows that learned compressors make them of.
        learned: whether there are such compressors.
    """

    tokens: int
    patches: int
    learned: bool = False


@dataclass(frozen=True)
class Update:
    """A micro-step of training.

    Args:
        rows: sequences of a forward. length: positions of each. scored: positions with a label in all of them.
        prefix: leading positions of a packed row that all completions share; 0 for rows of one completion each.
        seen: what each row shows.
        checkpointing: activations are computed again in the backward. bf16: under autocast.
        accumulates: gradients of micro-steps before are there.
        lora: trained through adapters. rates: learning rate by part, see `frugalpath.sft.supervised.train_sft`.
        supervised: of a supervised stage, not of GRPO.
    """

    rows: int
    length: int
    scored: int
    prefix: int
    seen: Seen
    checkpointing: bool
    bf16: bool
    accumulates: bool
    lora: Mapping[str, Any] | None
    rates: Mapping[str, float] | None = None
    supervised: bool = False


@dataclass(frozen=True)
class Writing:
    """Generation of completions.

    Args:
        prompts: of a batch. width: completions of each. length: tokens of a prompt. written: tokens of a completion.
        seen: what each prompt shows. bf16: under autocast. trained: the weights have gradients switched on.
        lora: adapters are beside the weights.
    """

    prompts: int
    width: int
    length: int
    written: int
    seen: Seen
    bf16: bool
    trained: bool
    lora: Mapping[str, Any] | None


def trace(subject: Subject, job: Update | Writing, gpu: bool) -> Trace:
    """Trace what a job holds besides weights, optimizer state and caches; results are cached.

    Args:
        gpu: assume the kernels of a GPU.
    """
    key = f"{subject.key} {job} {gpu}"
    if key not in _TRACED:
        _TRACED[key] = _trace(subject, job, gpu)
    return _TRACED[key]


def _trace(subject: Subject, job: Update | Writing, gpu: bool) -> Trace:
    work = _update if isinstance(job, Update) else _writing
    routes = subject.routes
    if subject.layers <= DEPTH + 1:
        return work(subject, job, gpu, None)  # type: ignore[arg-type]
    ends = [work(subject.shorter(layers, min(1, routes)), job, gpu, layers) for layers in (DEPTH, DEPTH + 1)]  # type: ignore[arg-type]
    grown = ends[0].deeper(ends[1], subject.layers - DEPTH - 1)
    if routes < 2:
        return grown
    # Layers that look at visual tokens outside the text take more than others.
    looking = work(subject.shorter(DEPTH + 1, 2), job, gpu, DEPTH + 1)  # type: ignore[arg-type]
    return grown.plus(ends[1], looking, routes - 1)


def prepared(model: Any, subject: Subject, lora: Mapping[str, Any] | None, rates: Mapping[str, float] | None) -> Any:
    """Prepare a model for training: add adapters, and enable gradients of the trained parts."""
    if lora is not None:
        adapters = lora_config(replace(subject.performer, lora=dict(lora)), model)
        assert adapters is not None
        model = get_peft_model(model, adapters)
    if rates is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(rates.get(part_of(name) or "", 0.0) > 0)
    return model


def _pretended(subject: Subject, job: Update | Writing, gpu: bool, layers: int | None) -> Any:
    """Prepare the model with tensors of the current `FakeTensorMode`."""
    rates = job.rates if isinstance(job, Update) else None
    # PEFT moves its adapters, and some models make constants, which pretended tensors do not allow.
    with unset_fake_temporarily(), torch.device("meta"):
        model = prepared(subject.build(layers, _attention(job, gpu)), subject, job.lora, rates)
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and id(own) not in made:
                made[id(own)] = torch.nn.Parameter(torch.empty(own.shape, dtype=own.dtype), own.requires_grad)
            module._parameters[name] = None if own is None else made[id(own)]
        for name, own in module._buffers.items():
            module._buffers[name] = None if own is None else torch.empty(own.shape, dtype=own.dtype)
    return model


def _attention(job: Update | Writing, gpu: bool) -> str:
    if gpu:
        return GPU
    return SHARED_PREFIX if isinstance(job, Writing) or not job.supervised else "sdpa"


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _autocast(on: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def _update(subject: Subject, job: Update, gpu: bool, layers: int | None) -> Trace:
    with FakeTensorMode():
        model = _pretended(subject, job, gpu, layers)
        model.train()
        if job.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            if job.lora is not None:
                model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        if job.accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        base, ledger = _base(model), Ledger()
        ledger.leave_out([*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)])
        if not job.accumulates:
            for parameter in trained:
                ledger.watch(parameter)
        with ledger:
            ledger.mark("forward")
            with _autocast(job.bf16):
                hidden = _read(base, job.rows, job.length, job.seen, _mask(base, job), ledger)
                ledger.trace.kept = ledger.now
                ledger.mark("head")
                weight = base.get_output_embeddings().weight
                total = score(hidden, weight, job.scored, job.supervised, gpu).sum()
            ledger.mark("head_backward")
            del hidden
            total.backward()
    return ledger.trace


def _mask(base: Any, job: Update) -> dict[str, Any]:
    """Attention mask as the trainers make it, of packed or padded rows."""
    if job.prefix:
        segment = torch.zeros(job.rows, job.length, dtype=torch.long)
        dtype = torch.get_autocast_dtype("cpu") if job.bf16 else base.dtype
        # Where image tokens see those after them, the prefix is not plainly causal: see `rl.packing.packed_mask`.
        start = 0 if base.config.model_type == "gemma3" else job.prefix
        mask = as_mask(block_mask(segment, start), dtype)
        return {"attention_mask": mask, **({"prefix_length": start} if start else {})}
    return _padded(job.rows, job.length)


def _padded(rows: int, length: int) -> dict[str, Any]:
    if rows == 1:
        return {"attention_mask": None}
    return {"attention_mask": torch.ones(rows, 1, length, length, dtype=torch.bool)}


def _read(
    base: Any, rows: int, length: int, seen: Seen, extra: dict[str, Any], ledger: Ledger, cache: Any = None
) -> torch.Tensor:
    """Hidden states (rows, length, d) of prompts with their visual input."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    embeds = base.get_input_embeddings()(ids)
    routes = getattr(base.model, "routes", None)
    if seen.tokens:
        tokens = _look(base, rows, seen)
        if routes is not None:
            extra = {**extra, MEMORY: routes.remember(tokens, torch.full((rows,), seen.tokens))}
        else:
            embeds = embeds.masked_scatter((ids == 0)[..., None], tokens.to(embeds.dtype))
    text = base.get_decoder()
    _watch_layers(text, embeds, ledger)
    if extra["attention_mask"] is not None:
        extra = {**extra, "position_ids": torch.arange(length).expand(rows, -1)}
    caching = {"past_key_values": cache, "use_cache": True} if cache is not None else {"use_cache": False}
    out = text(inputs_embeds=embeds, **extra, **caching)
    hidden = out.last_hidden_state
    if hidden.requires_grad:
        hidden.register_hook(lambda _: ledger.mark("last_layer"))
    return hidden


def _look(base: Any, rows: int, seen: Seen) -> torch.Tensor:
    """Visual tokens (rows, tokens, d): features after the model's trained compressors and projection."""
    if not hasattr(base.model, "aligner"):
        return torch.zeros(rows, seen.tokens, base.config.get_text_config().hidden_size, dtype=base.dtype)
    width = base.config.feature_dim
    features = torch.zeros(rows * seen.patches, width + COLUMNS)
    if not seen.learned:
        made = base.model.aligner(features[:, :-COLUMNS], features[:, -COLUMNS:-1])
        return made.view(rows, seen.patches, -1)
    block = features.view(rows, seen.patches, -1)
    tokens = Tokens(block[..., :-COLUMNS], block[..., -COLUMNS:-1], block[..., -1])
    asked = torch.zeros(rows, base.config.get_text_config().hidden_size) if base.model.compressor.asks else None
    made = base.model.compressor(tokens, seen.tokens, asked)
    return base.model.aligner(made.features, made.place)


def _see(base: Any, count: int, seen: Seen, gpu: bool, ledger: Ledger) -> None:
    """Encode new images of `count` prompts with a vision tower; one of its layers stands for all.

    All images are preprocessed in main memory before the tower reads the first.
    """
    kind = base.config.model_type
    if not seen.tokens or kind not in ("qwen2_5_vl", "gemma3"):
        return
    ledger.mark("first sight")
    vision = base.config.vision_config
    if kind == "gemma3":
        at_once = min(count, TOWER_IMAGES)
        shape: tuple[int, ...] = (vision.num_channels, vision.image_size, vision.image_size)
    else:
        each = seen.tokens * vision.spatial_merge_size**2
        at_once = min(count, max(1, TOWER_PATCHES // each))
        shape = (each, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    ready = [] if gpu else [torch.zeros(shape) for _ in range(count)]
    pixels = torch.zeros(at_once, *shape)
    if kind == "gemma3":
        base.get_image_features(pixels.to(base.dtype), return_dict=True)
    else:
        _read_patches(base.model.visual, pixels.flatten(0, 1), at_once)
    del ready


def _read_patches(tower: Any, pixels: torch.Tensor, images: int) -> None:
    """Run the vision tower of a Qwen2.5-VL step by step, since its forward reads values of tensors."""
    hidden = tower.patch_embed(pixels)
    places = torch.zeros(len(hidden), hidden.shape[-1] // tower.config.num_heads)
    ends = np.arange(images + 1) * (len(hidden) // images)
    hidden = tower.blocks[0](hidden, cu_seqlens=ends, position_embeddings=(places, places))
    tower.merger(hidden)


def _watch_layers(text: Any, embeds: torch.Tensor, ledger: Ledger) -> None:
    """Mark the moments of the backward pass: first layer, other layers, and what comes before."""
    if not torch.is_grad_enabled():
        return
    layers = decoder_layers(text)
    for at, layer in enumerate(layers[:-1]):
        # Where a model is traced at few layers, those between the first and the last are left out.
        name = "first_layer" if at == 0 else "layers" if len(layers) > DEPTH + 1 else f"layer {at}"

        def follow(_: Any, inputs: Any, out: Any, name: str = name) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _: ledger.mark(name))

        layer.register_forward_hook(follow)
    if embeds.requires_grad:
        embeds.register_hook(lambda _: ledger.mark("inputs"))


@torch.no_grad()
def _writing(subject: Subject, job: Writing, gpu: bool, layers: int | None) -> Trace:
    with FakeTensorMode():
        model = _pretended(subject, job, gpu, layers)
        if not job.trained:
            model.requires_grad_(False)
        model.eval()
        base, ledger, count = _base(model), Ledger(), job.prompts
        ledger.leave_out([*model.parameters(), *model.buffers()])
        text, head = base.get_decoder(), base.get_output_embeddings()
        with ledger, _autocast(job.bf16):
            _see(base, count, job.seen, gpu, ledger)
            ledger.mark("prefill")
            cache = DynamicCache()  # of full layers, as `frugalpath.models.generation` has it
            hidden = _read(base, count, job.length, job.seen, _padded(count, job.length), ledger, cache)
            logits = head(hidden[:, -1:]).repeat_interleave(job.width, 0)
            del hidden
            _choose(logits[:, -1])
            ledger.mark("decode")
            full = job.length + job.width * max(0, job.written - 2)
            for layer in cache.layers:
                heads, width = layer.keys.shape[1], layer.keys.shape[3]
                layer.keys = layer.keys.new_empty(count, heads, full, width)
                layer.values = layer.values.new_empty(count, heads, full, width)
            allowed = torch.ones(count, job.width, full + job.width, dtype=torch.bool)
            embeds = base.get_input_embeddings()(torch.zeros(count, job.width, dtype=torch.long))
            out = text(
                inputs_embeds=embeds,
                attention_mask=as_mask(allowed[:, None], base.dtype),
                position_ids=torch.zeros(count, job.width, dtype=torch.long),
                past_key_values=cache,
                use_cache=True,
            )
            logits = head(out.last_hidden_state).reshape(count * job.width, -1)
            _choose(logits)
            ledger.trace.kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return ledger.trace


def _choose(logits: torch.Tensor) -> torch.Tensor:
    """Sample the next tokens like `frugalpath.models.generation`, with the image token banned."""
    scores = logits.to(copy=True, dtype=torch.float32)
    scores = torch.where(torch.zeros(scores.shape[-1], dtype=torch.bool), -torch.inf, scores)
    return scores.softmax(-1).argmax(-1)
