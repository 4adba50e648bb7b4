"""The batch at hand: what its rows show, how rows that share a prompt are packed, and which of them teach anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather

from frugalpath.models.generation import by_length, to_device
from frugalpath.models.vision_adapter import Prompt, VisionAdapter
from frugalpath.rl.batches import split_silent
from frugalpath.rl.packing import PackedBatch, groups_of, pack


@dataclass
class Rollout:
    """Rows of a batch and the prompts that they share.

    It is made anew with every generation batch. Micro-batches have its prompts and rows of their own, see `of_rows`.

    Args:
        prompts: each once.
        rows: the index of its prompt, for each row.
        inputs: rows of the training set, with their views.
        defer_old: the next pass is not made for the old log-probabilities, which come with the update.
        logps: (rows, tokens) of the last pass.
    """

    prompts: list[Prompt] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    defer_old: bool = False
    logps: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    def ids(self) -> list[list[int]]:
        """Token ids of each row's prompt; rows of one prompt share the list."""
        ids = [p.ids.tolist() for p in self.prompts]
        return [ids[i] for i in self.rows]

    def fields(self, sight: VisionAdapter) -> dict[str, Any]:
        """Visual inputs as TRL carries them, repeated for every row."""
        shown = [self.prompts[i].views for i in self.rows]
        fields = dict(sight.fields([v for views in shown for v in views]))
        return {**fields, "num_images": [len(v) for v in shown]} if fields else {}

    def packed_length(self, group: Sequence[int], written: Sequence[int]) -> int:
        """Tokens of a group's packed row.

        Args:
            written: length of each row's completion.
        """
        return len(self.prompts[self.rows[group[0]]]) - 1 + sum(written[row] + 1 for row in group)

    def forwards(self, written: Sequence[int], batch_size: int | None) -> list[list[list[int]]]:
        """Groups of rows for each forward, from the length of every row's completion."""
        if PartialState().num_processes > 1:
            # As many forwards on every process: each is a collective, of buffers or of sharded weights.
            size = batch_size or len(self.rows)
            parts = [range(len(self.rows))[at : at + size] for at in range(0, len(self.rows), size)]
            return [[[part[row] for row in g] for g in groups_of([self.rows[row] for row in part])] for part in parts]
        groups = groups_of(self.rows)
        cap = None if batch_size is None else max(1, batch_size // max(map(len, groups)))
        lengths = [self.packed_length(g, written) for g in groups]
        return [[groups[g] for g in chunk] for chunk in by_length(lengths, cap=cap)]

    def packed(
        self, forwards: Sequence[Sequence[list[int]]], completions: torch.Tensor, valid: torch.Tensor, padding: int
    ) -> Iterator[tuple[torch.Tensor, PackedBatch, list[Prompt]]]:
        """Of each forward its rows, their packed tokens, and the prompts in the order in which they are packed."""
        for groups in forwards:
            rows = torch.tensor([row for g in groups for row in g], device=completions.device)
            local = iter(range(len(rows)))
            read = [self.prompts[self.rows[g[0]]] for g in groups]
            places = [[next(local) for _ in g] for g in groups]
            ids, positions = [p.ids for p in read], [p.positions for p in read]
            yield rows, pack(ids, positions, places, completions[rows], valid[rows], padding), read

    def teaching(self, written: Sequence[int], advantages: torch.Tensor) -> torch.Tensor | None:
        """Rows of the groups with some advantage, None for all.

        At least one row stays, and as many on every process, as TRL gathers values of rows.
        """
        device = advantages.device
        teaching, silent = split_silent(groups_of(self.rows), advantages)
        silent.sort(key=lambda g: self.packed_length(g, written))
        count = torch.tensor(max(1, len(teaching)), device=device)
        wanted = int(gather(count).max()) if PartialState().num_processes > 1 else int(count)
        kept = teaching + [row for g in silent for row in g][: wanted - len(teaching)]
        return None if len(kept) == len(self.rows) else torch.tensor(sorted(kept), device=device)


def packed_logps(
    model: Any,
    sight: VisionAdapter,
    packed: Iterator[tuple[torch.Tensor, PackedBatch, list[Prompt]]],
    like: torch.Tensor,
    mask: Callable[[PackedBatch], dict[str, Any]],
    autocast: Callable[[], AbstractContextManager[Any]],
    entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities and entropies of completions, each prompt read once for all of its own.

    Args:
        packed: see `Rollout.packed`. like: completions (rows, tokens), whose shape and device the result has.
        mask: attention arguments of a packed forward, called where autocast holds.
    """
    logps = torch.zeros(like.shape, device=like.device)
    entropies = torch.zeros_like(logps)
    for rows, part, read in packed:
        seen = sight.inputs(model, [p.views for p in read])
        with autocast():
            out = model(
                input_ids=part.input_ids,
                position_ids=part.position_ids,
                labels=part.labels,
                fused_lm_head=True,
                **mask(part),
                **to_device(seen, part.input_ids.device),
            )
        own = (len(rows), like.shape[1])
        logps = logps.to(out.log_probs.dtype).index_copy(0, rows, part.scatter(out.log_probs, *own))
        if entropy:
            entropies = entropies.to(out.entropy.dtype).index_copy(0, rows, part.scatter(out.entropy, *own))
    return logps, entropies if entropy else None
