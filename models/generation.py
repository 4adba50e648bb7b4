"""Generate completions, reading each prompt only once for all its completions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig

from frugalpath.models.attention import as_mask, check_window, dense_attention
from frugalpath.models.vision_adapter import Prompt, VisionAdapter, stack_positions


def generate(
    model: Any,
    sight: VisionAdapter,
    prompts: Sequence[Prompt],
    copies: Sequence[int],
    config: GenerationConfig,
) -> list[list[int]]:
    """Token ids of completions, see `generate_sure`."""
    return [ids for ids, _ in generate_sure(model, sight, prompts, copies, config, sure=False)]


@torch.no_grad()
def generate_sure(
    model: Any,
    sight: VisionAdapter,
    prompts: Sequence[Prompt],
    copies: Sequence[int],
    config: GenerationConfig,
    sure: bool = True,
) -> list[tuple[list[int], float]]:
    """Completions of the prompts: `copies[0]` of the first, then `copies[1]` of the second, and so on.

    A prompt is prefilled once, and all its completions read that one KV cache: a step appends one token of each
    completion to it, and a mask keeps them apart. Prompts of like length share a batch.

    Args:
        config: as for `model.generate`, with `pad_token_id` and `eos_token_id`; sampling or greedy.
        sure: whether to add up log-probabilities.

    Returns:
        Of each completion the token ids, up to and with the first end token, and the model's own log-probability of
        them (before temperature and bans); 0 where it is not wanted.

    Raises:
        ValueError: the configuration asks for a search or a stop that is not made here.
    """
    check(config)
    starts = [0, *accumulate(copies)]
    completions: list[tuple[list[int], float]] = [([], 0.0)] * starts[-1]
    check_window(model, max(map(len, prompts), default=0) + config.max_new_tokens)
    with dense_attention(model):
        for chunk in by_length([len(p) for p in prompts]):
            width = max(copies[i] for i in chunk)
            written = _write(model, sight, [prompts[i] for i in chunk], width, config, sure)
            for i, rows in zip(chunk, written, strict=True):
                completions[starts[i] : starts[i + 1]] = rows[: copies[i]]
    return completions


def _write(
    model: Any, sight: VisionAdapter, prompts: Sequence[Prompt], width: int, config: GenerationConfig, sure: bool
) -> list[list[tuple[list[int], float]]]:
    """`width` completions of each of the prompts, which share a batch."""
    device = model.get_input_embeddings().weight.device
    ids = _left([p.ids for p in prompts], config.pad_token_id).to(device)
    prefix = _left([torch.ones_like(p.ids) for p in prompts], 0).to(device)
    places = stack_positions([p.positions for p in prompts], "left").to(device)
    out = model(
        input_ids=ids,
        attention_mask=prefix,
        position_ids=places,
        # Of full layers: all completions of a prompt stand side by side in it, more than a sliding window holds.
        past_key_values=DynamicCache(),
        use_cache=True,
        logits_to_keep=1,
        **sight.typed(ids),
        **to_device(sight.inputs(model, [p.views for p in prompts]), device),
    )
    return write_on(model, sight, prompts, ids, prefix, out, width, config, sure)


@torch.no_grad()
def write_on(
    model: Any,
    sight: VisionAdapter,
    prompts: Sequence[Prompt],
    ids: torch.Tensor,
    prefix: torch.Tensor,
    out: Any,
    width: int,
    config: GenerationConfig,
    sure: bool,
) -> list[list[tuple[list[int], float]]]:
    """Write completions of prompts that have been read.

    Args:
        ids: (B, P) of the prompts, left-padded. prefix: (B, P), 0 where padded.
        out: of the forward that read their ends: logits of the last position, and the KV cache of all, which grows.
        width: completions of each prompt.

    Returns:
        For each prompt what `generate_sure` returns of its completions.
    """
    device = ids.device
    count, rows, axes = len(prompts), len(prompts) * width, len(prompts[0].positions)
    choose = _chooser(model, config, ids.repeat_interleave(width, 0))
    logits = out.logits[:, -1].repeat_interleave(width, 0)
    after = torch.tensor([p.next_position for p in prompts], device=device)[:, None].expand(count, width)
    # A step's tokens see the prompt and what their own completion has so far, themselves included.
    seen = prefix.bool()[:, None, :].expand(count, width, -1)
    own = torch.eye(width, dtype=torch.bool, device=device).expand(count, width, width)
    tokens: list[torch.Tensor] = []
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    logp = torch.zeros(rows, device=device)
    for step in range(config.max_new_tokens):
        chosen, ended = choose(logits, tokens)
        if sure:
            logp -= F.cross_entropy(logits.float(), chosen, reduction="none").masked_fill(done, 0.0)
        tokens.append(chosen.masked_fill(done, config.pad_token_id))
        done |= ended
        if step + 1 == config.max_new_tokens or bool(done.all()):
            break
        seen = torch.cat([seen, own], -1)
        out = model(
            input_ids=tokens[-1].view(count, width),
            attention_mask=as_mask(seen[:, None], model.get_input_embeddings().weight.dtype),
            position_ids=(after + step).expand(*([axes] if axes > 1 else []), -1, -1),
            past_key_values=out.past_key_values,
            use_cache=True,
            **sight.again(out),
        )
        logits = out.logits.reshape(rows, -1)
    written = torch.stack(tokens, 1)
    ends = _ends(written, config)
    flat = [(row[:n], p) for row, n, p in zip(written.tolist(), ends, logp.tolist(), strict=True)]
    return [flat[i * width : (i + 1) * width] for i in range(count)]


def _chooser(
    model: Any, config: GenerationConfig, ids: torch.Tensor
) -> Callable[[torch.Tensor, list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """Picks the next token of every row as transformers does, by all processors that the configuration asks for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Unset values come from the model's own configuration, and the copy is changed in place below.
    config, _ = base._prepare_generation_config(copy.deepcopy(config))
    base._prepare_special_tokens(config, True, device=ids.device)
    processors = base._get_logits_processor(config, ids.shape[1], ids, device=ids.device, logits_processor=[])
    ends = torch.tensor(_end_ids(config), device=ids.device)

    def choose(logits: torch.Tensor, tokens: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        written = torch.cat([ids, torch.stack(tokens, 1)], 1) if tokens else ids
        scores = processors(written, logits.to(copy=True, dtype=torch.float32))
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if config.do_sample else scores.argmax(-1)
        return chosen, torch.isin(chosen, ends)

    return choose


def check(config: GenerationConfig) -> None:
    """Raise ValueError for settings that `generate` does not support.

    Raises:
        ValueError: with the remedy.
    """
    asked = {
        "num_beams": (config.num_beams or 1) > 1,
        "stop_strings": config.stop_strings is not None,
        "max_time": config.max_time is not None,
        "num_return_sequences": (config.num_return_sequences or 1) > 1,
        "cache_implementation": config.cache_implementation is not None,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens is not None,
        "guidance_scale": config.guidance_scale not in (None, 1),
        "max_new_tokens": config.max_new_tokens is None,
    }
    wrong = [name for name, bad in asked.items() if bad]
    if wrong:
        raise ValueError(
            f"generation: {', '.join(wrong)} is {'missing' if wrong == ['max_new_tokens'] else 'not done'} where a "
            "prompt is read once for all its completions; change generation_kwargs, or set prefill_once to false"
        )


def _end_ids(config: GenerationConfig) -> list[int]:
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _ends(tokens: torch.Tensor, config: GenerationConfig) -> list[int]:
    """Length of each row (rows, T) up to and with its first end token."""
    ended = torch.isin(tokens, torch.tensor(_end_ids(config), device=tokens.device))
    first = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
    return first.tolist()


def by_length(lengths: Sequence[int], waste: float = 0.25, cap: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of like length: padding stays under `waste` of a batch, a batch under `cap` items."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        longest, real, end = lengths[order[start]], 0, start
        while end < len(order) and (cap is None or end - start < cap):
            grown = real + lengths[order[end]]
            if grown < (1 - waste) * longest * (end + 1 - start):
                break
            real, end = grown, end + 1
        yield order[start:end]
        start = end


def to_device(inputs: Any, device: torch.device) -> Any:
    """Tensors of nested dictionaries, lists and tuples on a device."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return type(inputs)({k: to_device(v, device) for k, v in inputs.items()})
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(to_device(v, device) for v in inputs)
    return inputs


def _left(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left")
