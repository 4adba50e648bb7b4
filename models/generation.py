"""Generation that reads each prompt once, however many completions are asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from models.sight import Prompt, Sight


@torch.no_grad()
def generate(
    model: Any,
    sight: Sight,
    prompts: Sequence[Prompt],
    copies: Sequence[int],
    config: GenerationConfig,
) -> list[list[int]]:
    """Completions of the prompts: `copies[0]` of the first, then `copies[1]` of the second, and so on.

    A prompt is prefilled once and its KV cache is repeated. Prompts of like length share a batch.

    Args:
        config: of `model.generate`, with `pad_token_id` and `eos_token_id`.

    Returns:
        Token ids up to and with the first end token.
    """
    device = model.get_input_embeddings().weight.device
    starts = [0, *accumulate(copies)]
    completions: list[list[int]] = [[] for _ in range(starts[-1])]
    ends_at = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    for chunk in by_length([len(p) for p in prompts]):
        read = [prompts[i] for i in chunk]
        index = torch.tensor([k for k, i in enumerate(chunk) for _ in range(copies[i])], device=device)
        ids = _left([p.ids for p in read], config.pad_token_id).to(device)
        mask = _left([torch.ones_like(p.ids) for p in read], 0).to(device)
        rows = [_left([p.positions[r] for p in read], 0) for r in range(len(read[0].positions))]
        positions = (rows[0] if len(rows) == 1 else torch.stack(rows)).to(device)
        prefill = model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[..., :-1],
            use_cache=True,
            logits_to_keep=1,
            **to_device(sight.inputs(model, [v for p in read for v in p.views]), device),
        )
        cache = prefill.past_key_values
        cache.batch_select_indices(index)
        offsets = torch.tensor([p.next_position - len(p) for p in read], device=device)[index]
        with sight.decoding(model, offsets):
            out = model.generate(
                input_ids=ids[index], attention_mask=mask[index], past_key_values=cache, generation_config=config
            )[:, ids.shape[1] :].tolist()
        written = iter(out)
        for i in chunk:
            for row in range(starts[i], starts[i + 1]):
                tokens = next(written)
                ends = [k + 1 for k, t in enumerate(tokens) if t in ends_at]
                completions[row] = tokens[: ends[0]] if ends else tokens
    return completions


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
