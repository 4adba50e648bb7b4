"""FLOPs of the language model in training, rollouts among them; padding and attention are not counted."""

from __future__ import annotations

from torch import nn

SEEING = ("visual", "vision_tower", "multi_modal_projector")
"""Parts of models that are not the language model."""


class FlopCount:
    """FLOPs since they were last taken.

    Args:
        model: that is trained; what has gradients by now is what is trained.
    """

    def __init__(self, model: nn.Module):
        own = {n: p for n, p in model.named_parameters() if not any(part in n for part in SEEING)}
        self._parameters = sum(_size(p) for n, p in own.items() if "embed_tokens" not in n)
        trained = sum(_size(p) for p in own.values() if p.requires_grad)
        self._trained = min(1.0, trained / max(1, self._parameters))
        self._flops = 0.0

    def add(self, tokens: int, update: bool = False) -> None:
        """Add a pass: 2 a parameter and token; an update 2 more for inputs and 2 for trained weights."""
        passes = 4 + 2 * self._trained if update else 2
        self._flops += passes * self._parameters * tokens

    def take(self) -> int:
        """What was added since the last call."""
        flops, self._flops = self._flops, 0.0
        return int(flops)


def _size(parameter: nn.Parameter) -> int:
    # Of a partitioned one (ZeRO-3) `numel` is 0.
    return getattr(parameter, "ds_numel", parameter.numel())
