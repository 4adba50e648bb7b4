"""Interface and fingerprint of a frozen tile encoder."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from frugalpath.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Pixels encoded in one pass. On a CPU small passes keep the activations in cache: 8 tiles of 224 px took 30 % less
# time a tile than 64 on two cores. A GPU wants large ones.
_PASS_PIXELS = {"cpu": 8 * 224 * 224, "cuda": 256 * 224 * 224}
PRECISIONS = ("float32", "bfloat16", "float16")
"""Precisions of an encoder. With `float32`, features of GPU and CPU agree to about 1e-5."""


class PatchEncoder:
    """A frozen encoder in eval mode.

    Attributes:
        name: the name it was loaded by.
        dim: length of a feature vector.
        stride: pixels per cell of the feature map.
        fingerprint: `name@hash`, where the hash covers weights, revision and normalisation, followed by the precision
            where it is not float32: equal fingerprints mean equal features.
        precision: see `PRECISIONS`.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        *,
        dim: int,
        stride: int,
        mean: Iterable[float] = IMAGENET_MEAN,
        std: Iterable[float] = IMAGENET_STD,
        fingerprint: str,
        device: str = "cpu",
        precision: str = "float32",
    ):
        """`backbone(x)` takes normalised float (B, 3, H, W) and returns pooled (B, dim) and map (B, h, w, dim).

        Raises:
            InputError: there is no such precision or device.
        """
        if precision not in PRECISIONS:
            raise InputError(f"precision {precision!r} of encoder {name}: use one of {', '.join(PRECISIONS)}")
        self.name, self.dim, self.stride, self.precision = name, dim, stride, precision
        self.fingerprint = fingerprint if precision == "float32" else f"{fingerprint}/{precision}"
        self.device = usable_device(device)
        self._backbone = backbone.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)
        # uint8 -> normalised float is one multiply and one add.
        std_255 = torch.tensor(tuple(std)) * 255
        self._scale = (1 / std_255).view(3, 1, 1).to(self.device)
        self._shift = (-torch.tensor(tuple(mean)) * 255 / std_255).view(3, 1, 1).to(self.device)

    def encode(self, tiles: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Encode one vector per tile: uint8 (B, H, W, 3) -> float32 (B, dim) on the encoder's device.

        H and W are multiples of `stride`. Raises InputError for any other shape or type.
        """
        return self._run(tiles, pooled=True)

    def feature_map(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """One vector a cell: uint8 (B, H, W, 3) -> float32 (B, H / stride, W / stride, dim) on the encoder's device.

        H and W are multiples of `stride`. Raises InputError for any other shape or type.
        """
        return self._run(images, pooled=False)

    def images_per_pass(self, height: int, width: int) -> int:
        """Best number of images of a size (in px) per pass on this device."""
        return max(1, _PASS_PIXELS.get(self.device.type, _PASS_PIXELS["cuda"]) // (height * width))

    def _run(self, tiles: np.ndarray | torch.Tensor, pooled: bool) -> torch.Tensor:
        images = torch.as_tensor(tiles)
        self._check(images)
        count, height, width, _ = images.shape
        cells = () if pooled else (height // self.stride, width // self.stride)
        # Made outside inference mode, so that trainable layers may take it as their input.
        out = torch.empty((count, *cells, self.dim), device=self.device)
        step = self.images_per_pass(height, width)
        with torch.inference_mode(), self._arithmetic():
            for start in range(0, count, step):
                # NHWC memory seen as NCHW is channels_last already: no copy.
                x = images[start : start + step].to(self.device, non_blocking=True).permute(0, 3, 1, 2)
                x = torch.addcmul(self._shift, x.float(), self._scale)
                vector, grid = self._backbone(x.contiguous(memory_format=torch.channels_last))
                out[start : start + step] = vector if pooled else grid
        return out

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Context of the precision; for float32 it disables TF32, cuDNN's default for convolutions."""
        if self.precision != "float32":
            with torch.autocast(self.device.type, dtype=getattr(torch, self.precision)):
                yield
        elif self.device.type == "cuda":
            kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
            before = [kind.fp32_precision for kind in kinds]
            for kind in kinds:
                kind.fp32_precision = "ieee"
            try:
                yield
            finally:
                for kind, precision in zip(kinds, before, strict=True):
                    kind.fp32_precision = precision
        else:
            yield

    def _check(self, images: torch.Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"{self.name}: images must be uint8 of shape (B, H, W, 3), got {images.dtype} {tuple(images.shape)}"
            )
        height, width = images.shape[1:3]
        if height == 0 or width == 0 or height % self.stride or width % self.stride:
            raise InputError(
                f"{self.name}: height and width must be multiples of {self.stride} px, got {height} x {width}: "
                "resize or pad the images"
            )


def usable_device(name: str) -> torch.device:
    """Device by name; `auto` is this process's current accelerator, or the CPU.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return (
            torch.device("cpu")
            if found is None
            else torch.device(found.type, torch.accelerator.current_device_index())
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # each backend has its own way of not being there
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used ({reason}); use auto, cpu, cuda or cuda:N") from error
    return device


def weights_hash(parts: Iterable[bytes | memoryview]) -> str:
    """Twelve hex digits that identify weights and settings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]
