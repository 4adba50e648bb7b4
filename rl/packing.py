"""Packed rows that hold a prompt once and its completions after it: pure functions of tensors.

A row is `[prompt without its last token] + G x [last prompt token, completion]`. Repeating the last prompt token lets
every suffix predict its own first completion token; it costs G tokens. A suffix sees the prefix and itself, and its
positions go on from the prompt's, so that log-probabilities are those of G separate rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from frugalpath.models.attention import FLEX, SHARED_PREFIX, as_mask
from frugalpath.models.vision_adapter import stack_positions


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows of b prompts, right-padded to T tokens.

    Args:
        input_ids, labels: (b, T); labels are -100 outside the completions.
        position_ids: (b, T), or (3, b, T) for multimodal RoPE.
        segment: (b, T) 0 for a prefix, 1..G for its suffixes, -1 for padding.
        source: (b, T) index of the completion token in the flattened (rows, C) completions, -1 elsewhere.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    segment: torch.Tensor
    source: torch.Tensor

    def scatter(self, values: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        """Per-token results (b, T - 1) of next-token prediction back to (rows, width) completions, 0 where none."""
        here = self.source[:, 1:]
        out = values.new_zeros(rows * width)
        return out.index_put((here[here >= 0],), values[here >= 0]).view(rows, width)


def pack(
    prompts: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    completions: torch.Tensor,
    valid: torch.Tensor,
    pad_token_id: int,
) -> PackedBatch:
    """Pack b prompts with their completions.

    Args:
        prompts: b prompts, each (P_i,), without padding.
        positions: of the prompts, each (R, P_i); R is 1, or 3 for multimodal RoPE.
        groups: for each prompt the rows of its completions.
        completions: (rows, C) token ids.
        valid: (rows, C) bool, True for the tokens of a completion.
    """
    device, width = completions.device, completions.shape[1]
    kept = valid.cpu()
    columns: dict[str, list[torch.Tensor]] = {"ids": [], "segment": [], "source": []}
    places: list[torch.Tensor] = []
    for prompt, place, rows in zip(prompts, positions, groups, strict=True):
        prompt, place = prompt.to(device), place.cpu()
        n, after = len(prompt) - 1, int(place.max()) + 1
        here = [kept[row].nonzero()[:, 0] for row in rows]
        suffixes = [
            torch.cat([prompt[-1:], completions[row, k.to(device)]]) for row, k in zip(rows, here, strict=True)
        ]
        columns["ids"].append(torch.cat([prompt[:-1], *suffixes]))
        steps = [torch.cat([place[:, -1:], (after + torch.arange(len(k))).expand(len(place), -1)], 1) for k in here]
        places.append(torch.cat([place[:, :-1], *steps], 1))
        lengths = torch.tensor([n, *(len(k) + 1 for k in here)])
        columns["segment"].append(torch.arange(len(lengths)).repeat_interleave(lengths))
        last = torch.tensor([-1])
        columns["source"].append(
            torch.cat(
                [last.expand(n), *(x for row, k in zip(rows, here, strict=True) for x in (last, row * width + k))]
            )
        )
    fill = {"ids": pad_token_id, "segment": -1, "source": -1}
    ids, segment, source = (
        pad_sequence(columns[k], batch_first=True, padding_value=fill[k]).to(device) for k in columns
    )
    labels = ids.masked_fill(source < 0, -100)
    return PackedBatch(ids, stack_positions(places).to(device), labels, segment, source)


def prefix_length(segment: torch.Tensor) -> int:
    """Leading positions that belong to the prefix of every row of segments (b, T)."""
    return int((segment == 0).sum(1).min())


def runs_of(ids: torch.Tensor, token_id: int) -> torch.Tensor:
    """Number of the unbroken run of a token that each position of ids (b, T) belongs to, -1 for other tokens."""
    here = ids == token_id
    begins = here & ~F.pad(here, (1, 0))[:, :-1]
    return (begins.cumsum(1) - 1).masked_fill(~here, -1)


def block_mask(segment: torch.Tensor, start: int = 0, runs: torch.Tensor | None = None) -> torch.Tensor:
    """Mask (b, 1, T - start, T), True where a query may look, from segments (b, T); padding sees only itself.

    Args:
        start: queries before it are left out.
        runs: (b, T) of positions in the prefix that see all of their own run, see `runs_of`; None for none.
    """
    query, key = segment[:, start:, None], segment[:, None, :]
    place = torch.arange(segment.shape[1], device=segment.device)
    before, here = place[None, :] <= place[start:, None], place[None, :] == place[start:, None]
    allowed = (before & (query >= 0) & ((key == 0) | (key == query))) | here
    if runs is not None:
        allowed |= (runs[:, start:, None] == runs[:, None, :]) & (runs[:, None, :] >= 0)
    return allowed[:, None]


def flex_mask(segment: torch.Tensor, runs: torch.Tensor | None = None) -> Any:
    """The same as a `BlockMask` of FlexAttention, which skips blocks where nothing may look."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own, seen = segment[b, q], segment[b, k]
        plain = ((q >= k) & (own >= 0) & ((seen == 0) | (seen == own))) | (q == k)
        return plain if runs is None else plain | ((runs[b, q] == runs[b, k]) & (runs[b, k] >= 0))

    count, length = segment.shape
    return create_block_mask(allowed, count, None, length, length, device=str(segment.device))


def packed_mask(
    segment: torch.Tensor, attention: str, dtype: torch.dtype, runs: torch.Tensor | None = None
) -> dict[str, Any]:
    """Arguments of a forward that keep the completions of packed rows apart, as the model's attention takes them.

    Args:
        segment: (b, T), see `PackedBatch`. attention: what `frugalpath.models.attention.share_prefix` gave.
        dtype: of the queries. runs: see `block_mask`.
    """
    if attention == FLEX:
        return {"attention_mask": flex_mask(segment, runs)}
    # A prefix that is read in one piece is plainly causal.
    n = prefix_length(segment) if attention == SHARED_PREFIX and runs is None else 0
    mask = as_mask(block_mask(segment, n, runs), dtype)
    return {"attention_mask": mask, **({"prefix_length": n} if n else {})}


def groups_of(index: Sequence[int]) -> list[list[int]]:
    """Rows of each prompt, from the prompt's index of every row, in the order of their first rows."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(index):
        rows.setdefault(prompt, []).append(row)
    return list(rows.values())
