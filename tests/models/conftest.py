"""How a Qwen2.5-VL sees."""

from __future__ import annotations

import pytest

from frugalpath.models.image_view import ImageView
from frugalpath.models.qwen_vl import QwenVisionAdapter, backbone


@pytest.fixture
def sight(qwen) -> QwenVisionAdapter:
    return qwen.processor.sight


@pytest.fixture
def runs(qwen) -> list[int]:
    """Patches of every run of the vision tower."""
    return watch(qwen)


def watch(performer) -> list[int]:
    patches: list[int] = []
    visual = backbone(performer.model).visual
    visual.register_forward_hook(lambda module, inputs, out: patches.append(len(inputs[0])))
    return patches


def views_of(performer, case, budget) -> list[ImageView]:
    """New views, which remember nothing."""
    return [performer.processor.sight.view_at(path, budget) for path in case.images]
