"""Families with a vision tower; features of a frozen tower are cached in memory and optionally on disk."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any, Self

import torch
from cachetools import LRUCache

from frugalpath.models.feature_cache import FeatureCache, module_revision
from frugalpath.models.image_view import ImageView
from frugalpath.models.vision_adapter import VisionAdapter, VisualInput

HELD = 2e9
"""Maximum memory for cached visual features, in bytes."""


class TowerVisionAdapter(VisionAdapter, ABC):
    """Vision adapter of a model with a vision tower.

    Args:
        image_processor: of transformers, makes an image what the tower reads.
    """

    parts: tuple[str, ...]
    """Modules of the backbone that make an image its features; the first is the tower."""

    def __init__(self, image_token_id: int, image_processor: Any):
        super().__init__(image_token_id)
        self.processor = image_processor
        self.once = True
        self.cache: FeatureCache | None = None
        self.held: LRUCache = LRUCache(HELD, getsizeof=lambda features: features.nbytes)
        """What the tower saw last, by key."""
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        self.pool = ThreadPoolExecutor(max_workers=max(1, min(4, (os.cpu_count() or 2) - 1)))
        self.seen = 0
        """Images that the tower has read."""
        self._own: Any = None
        self._revision = ""
        self._lock = Lock()

    def __deepcopy__(self, memo: dict) -> Self:
        # Whoever copies a processor, to print it for instance, gets by with this one's threads and features.
        return self

    def keep_tower(self, model: Any, device: torch.device | None) -> None:
        base, self._own = holder_of(model, self.parts[0]), None
        towers = {name: getattr(base, name) for name in self.parts}
        if device is not None and all(map(is_frozen, towers.values())):
            # The backbone's ways and settings, without its other weights.
            self._own = copy.copy(base)
            self._own._modules = {name: copy.deepcopy(part).to(device).eval() for name, part in towers.items()}

    def eyes(self, model: Any) -> Any:
        """What sees for a model: its backbone, or one of no more than the copied tower."""
        return holder_of(model, self.parts[0]) if self._own is None else self._own

    def prefetch(self, views: Sequence[VisualInput]) -> None:
        """Begin to look up, or else read and prepare the images on other threads."""
        for view in views:
            assert isinstance(view, ImageView)
            if view.job is None and view.features is None:
                view.job = self.pool.submit(self._ready, view)

    @abstractmethod
    def _ready(self, view: ImageView) -> Any:
        """What a view's job gives: what the tower reads, or what it saw earlier."""

    def _keep(
        self,
        once: bool,
        cache: FeatureCache | None,
        autocast: Callable[[], AbstractContextManager],
        parts: Sequence[torch.nn.Module],
        weight: torch.Tensor,
    ) -> None:
        """Take the settings of `configure`.

        Args:
            parts: modules that what is kept on disk depends on. weight: one of theirs.
        """
        self.once, self.cache, self.autocast = once, cache, autocast
        self.held.clear()
        self._revision = self._made_by(parts, weight, cache) if cache is not None else ""

    def _made_by(self, parts: Sequence[torch.nn.Module], weight: torch.Tensor, cache: FeatureCache) -> str:
        """What features on disk depend on beside the image: weights, preprocessing and precision."""
        kind = weight.device.type
        with self.autocast():
            lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        return "-".join([*map(module_revision, parts), digest, str(lower), str(cache.dtype)])

    def _found(self, key: str) -> torch.Tensor | None:
        """What is kept under a key, in memory or on disk."""
        if not self.once:
            return None
        with self._lock:
            found = self.held.get(key)
        if found is None and self.cache is not None:
            found = self.cache.get(key)
            if found is not None:
                self._hold(key, found)
        return found

    def _hold(self, key: str, features: torch.Tensor) -> None:
        """Keep in memory."""
        if self.once and features.nbytes < self.held.maxsize:
            with self._lock:
                self.held[key] = features


def holder_of(model: Any, tower: str) -> Any:
    """The backbone that has the vision tower under this name, within wrappers of training and adapters."""
    if hasattr(model, tower):
        return model
    if hasattr(model, "get_base_model"):  # adapters
        return holder_of(model.get_base_model(), tower)
    return holder_of(model.module if hasattr(model, "module") else model.model, tower)


def is_frozen(module: torch.nn.Module) -> bool:
    """Whether none of its parameters is trained."""
    return not any(p.requires_grad for p in module.parameters())


def takes_features(base: Any) -> bool:
    """Whether the model's forward takes precomputed features (transformers 5.18 and newer)."""
    return "mm_encoder_outputs" in inspect.signature(type(base).forward).parameters
