"""Packed rows that hold a prompt once and its G completions after it: pure functions of tensors.

A row is `[prompt without its last token] + G x [last prompt token, completion]`. Repeating the last prompt token lets
every suffix predict its own first completion token; it costs G tokens. A suffix sees the prefix and itself, and its
positions go on from the prefix, so that log-probabilities are those of G separate rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows of b groups, right-padded to T tokens.

    Args:
        input_ids, position_ids, labels: (b, T); labels are -100 outside the completions.
        mask: (b, 1, T, T) bool, True where a query may look.
        source: (b, T) index of the completion token in the flattened (b * G, C) completions, -1 elsewhere.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor

    def scatter(self, values: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """Per-token results (b, T - 1) of next-token prediction back to (rows, width) completions, 0 where none."""
        here = self.source[:, 1:]
        out = values.new_zeros(rows * width)
        return out.index_put((here[here >= 0],), values[here >= 0]).view(rows, width)


def pack(
    prompts: Sequence[torch.Tensor], completions: torch.Tensor, valid: torch.Tensor, pad_token_id: int
) -> PackedBatch:
    """Pack b groups.

    Args:
        prompts: b prompts, each (P_i,), without padding.
        completions: (b * G, C) token ids, the G completions of a prompt side by side.
        valid: (b * G, C) bool, True up to the end of a completion.
    """
    count, width = completions.shape
    group = count // len(prompts)
    rows = []
    for g, prompt in enumerate(prompts):
        n = len(prompt) - 1
        ids, place, segment, source = [prompt[:-1]], [torch.arange(n)], [torch.zeros(n, dtype=torch.long)], []
        source.append(torch.full((n,), -1))
        for i in range(g * group, (g + 1) * group):
            kept = valid[i].nonzero()[:, 0].cpu()
            ids += [prompt[-1:], completions[i, kept]]
            place.append(n + torch.arange(len(kept) + 1))
            segment.append(torch.full((len(kept) + 1,), i - g * group + 1))
            source += [torch.tensor([-1]), i * width + kept]
        rows.append((torch.cat(ids), torch.cat(place), torch.cat(segment), torch.cat(source)))
    length = max(len(r[0]) for r in rows)
    device = completions.device
    ids = torch.full((len(rows), length), pad_token_id, device=device)
    place = torch.zeros(len(rows), length, dtype=torch.long)
    segment = torch.full((len(rows), length), -1)
    source = torch.full((len(rows), length), -1)
    for r, (tokens, positions, segments, sources) in enumerate(rows):
        t = len(tokens)
        ids[r, :t], place[r, :t], segment[r, :t], source[r, :t] = tokens, positions, segments, sources
    segment, source = segment.to(device), source.to(device)
    labels = ids.masked_fill(source < 0, -100)
    return PackedBatch(ids, place.to(device), labels, block_mask(segment), source)


def block_mask(segment: torch.Tensor) -> torch.Tensor:
    """Mask (b, 1, T, T) from segments (b, T): 0 prefix, 1..G suffixes, -1 padding, which sees only itself."""
    query, key = segment[:, :, None], segment[:, None, :]
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    diagonal = torch.eye(length, dtype=torch.bool, device=segment.device)
    return ((causal & (query >= 0) & ((key == 0) | (key == query))) | diagonal)[:, None]


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
