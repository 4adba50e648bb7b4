"""Rows of a batch: ordered, loaded once, shown once, shuffled by groups, left out without a change of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import RepeatSampler

from frugalpath.errors import InputError
from frugalpath.models.vision_adapter import VisionAdapter
from frugalpath.rl.packing import groups_of


class EpochSampler(RepeatSampler):
    """TRL's, with the order of an epoch the same in a resumed run: TRL's own begins again with that of the first.

    Args:
        trained: how many epochs are behind when one begins.
        options: of `RepeatSampler`.
    """

    def __init__(self, *args: Any, trained: Callable[[], int], **options: Any):
        super().__init__(*args, **options)
        self.trained = trained

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.trained()):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class LoadedOnce(Dataset):
    """A dataset that loads a row once for a batch that asks for it many times: images are decoded there."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self._last: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        # A generation batch is asked for again by each of its micro-batches.
        self._last = {i: self._last[i] if i in self._last else self.dataset[i] for i in dict.fromkeys(indices)}
        return [self._last[i] for i in indices]


class ShownOnce:
    """Makes the views of a batch's images once, for all rows that share them.

    Args:
        sight: of the model that is shown them.
    """

    def __init__(self, sight: VisionAdapter):
        self.sight = sight
        self._asked: list[dict[str, Any]] = []
        self._shown: list[dict[str, Any]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with their images as `views`; equal rows side by side share theirs.

        Raises:
            InputError: there are images, but prompts are texts.
        """
        asked = [{k: row.get(k) for k in ("prompt", "image", "images")} for row in rows]
        # TRL loads a generation batch again for each of its micro-batches and iterations.
        if asked != self._asked:
            self._asked, self._shown = asked, []
            images = [row["images"] or ([] if row["image"] is None else [row["image"]]) for row in asked]
            for at, (row, own) in enumerate(zip(asked, images, strict=True)):
                if at and row == asked[at - 1]:
                    self._shown.append(self._shown[-1])
                    continue
                prompt, views = row["prompt"], [self.sight.view(i) for i in own]
                if any(images):  # the log's column of prompts has one type
                    if isinstance(prompt, str):
                        raise InputError(
                            f"the prompts of a training set with images are texts, such as {prompt[:80]!r}; give "
                            "conversations and leave the chat template to the trainer"
                        )
                    prompt = prepare_multimodal_messages(prompt, images=views)
                self._shown.append({"views": views, "prompt": prompt})
        return [{**row, **shown} for row, shown in zip(rows, self._shown, strict=True)]


def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """Permute the groups of rows that share a prompt (`prompt_index`) in every per-row entry of a batch."""
    groups = groups_of(batch["prompt_index"].tolist())
    order = torch.tensor([row for g in torch.randperm(len(groups)).tolist() for row in groups[g]])
    return {key: take(value, order, len(order)) for key, value in batch.items()}


def take(value: Any, rows: torch.Tensor, count: int) -> Any:
    """The given rows of a per-row entry of a batch of `count` rows; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == count:
        return value[rows.to(value.device)]
    return value


def split_silent(groups: Sequence[list[int]], advantages: torch.Tensor) -> tuple[list[int], list[list[int]]]:
    """Rows of the groups with some advantage, and the groups without any.

    Args:
        advantages: (rows,), or (rows, C) for one of each token.
    """
    some = (advantages.reshape(len(advantages), -1).abs().amax(1) > 0).tolist()
    teaching: list[int] = []
    silent: list[list[int]] = []
    for group in groups:
        if any(some[row] for row in group):
            teaching += group
        else:
            silent.append(group)
    return teaching, silent


def share(loss_type: str, inputs: dict[str, Any], kept: torch.Tensor) -> float | torch.Tensor:
    """What the loss over the kept rows is multiplied by, so that its denominator is that of all rows."""
    if loss_type in ("cispo", "dapo", "vespo"):
        return 1.0  # divided by the tokens of the whole generation batch in any case
    if loss_type == "bnpo":
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        return mask[kept].sum().clamp(min=1.0) / mask.sum().clamp(min=1.0)
    return len(kept) / len(inputs["prompt_ids"])
