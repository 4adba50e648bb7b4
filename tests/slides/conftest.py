"""Slides that the tests write: tiled TIFF pyramids with tissue on glass, which OpenSlide opens like a scanner's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from scipy import ndimage
from torch import nn

from frugalpath.slides.patch_encoder import PatchEncoder

GLASS = 243


def tissue_image(height: int, width: int, *, spots: int = 1, seed: int = 0) -> np.ndarray:
    """Pink, textured ellipses on glass, uint8 (height, width, 3); `spots` of them side by side."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = np.zeros((height, width), bool)
    for spot in range(spots):
        centre = (spot + 0.5) * width / spots
        inside |= ((x - centre) / (0.38 * width / spots)) ** 2 + ((y - height / 2) / (0.4 * height)) ** 2 < 1
    texture = ndimage.gaussian_filter(rng.normal(size=(height, width)), 3)
    texture = (texture / texture.std() * 15)[..., None]
    image = np.full((height, width, 3), GLASS, np.float32) + rng.normal(scale=1, size=(height, width, 1))
    image[inside] = (np.array([205, 130, 180]) + texture)[inside]
    return image.clip(0, 255).astype(np.uint8)


def write_slide(
    path: Path,
    image: np.ndarray,
    mpp: float | None = 1.0,
    *,
    downs: tuple[int, ...] = (1, 2),
    compression: str | None = "jpeg",
    unit: str = "CENTIMETER",
    tile: int = 256,
) -> Path:
    """Write a pyramid whose resolution tags tell `mpp` (None: they tell nothing)."""
    with tifffile.TiffWriter(path) as writer:
        for down in downs:
            height, width = (side // down * down for side in image.shape[:2])
            level = image[:height, :width].reshape(height // down, down, width // down, down, 3).mean((1, 3))
            keys = {} if mpp is None else {"resolution": (1e4 / mpp / down,) * 2, "resolutionunit": unit}
            if unit == "INCH" and mpp is not None:
                keys["resolution"] = (25400 / mpp / down,) * 2
            writer.write(
                level.round().astype(np.uint8),
                tile=(tile, tile),
                photometric="rgb",
                compression=compression,
                subfiletype=int(down > 1),
                **keys,
            )
    return path


class _MeanColour(nn.Module):
    """Features that tell where they come from: the mean colour of each 32 px cell."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = nn.functional.avg_pool2d(x, 32).permute(0, 2, 3, 1)
        return grid.mean((1, 2)), grid


@pytest.fixture
def encoder() -> PatchEncoder:
    return PatchEncoder(
        "mean-colour", _MeanColour(), dim=3, stride=32, mean=(0, 0, 0), std=(1, 1, 1), fingerprint="m@1"
    )


@pytest.fixture
def make_slide(tmp_path: Path) -> Callable[..., Path]:
    """Write a slide of tissue into the test's folder."""

    def make(name: str = "slide.tif", height: int = 1000, width: int = 1300, mpp: float | None = 1.0, **keys) -> Path:
        image = keys.pop("image", None)
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_slide(path, tissue_image(height, width) if image is None else image, mpp, **keys)

    return make


@pytest.fixture
def corrupt_tile() -> Callable[..., Path]:
    """Overwrite one tile of a file with zeros, as a download that broke off leaves them."""

    def corrupt(path: Path, index: int, page: int = 0) -> Path:
        with tifffile.TiffFile(path) as file:
            start, count = file.pages[page].dataoffsets[index], file.pages[page].databytecounts[index]
        data = bytearray(path.read_bytes())
        data[start : start + count] = bytes(count)
        path.write_bytes(data)
        return path

    return corrupt
