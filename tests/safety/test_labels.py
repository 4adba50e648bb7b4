"""The label and macro pictures of a slide, which may show a patient's name, are neither read nor written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from frugalpath.envs.files import inspect_files
from frugalpath.evaluation.report.pictures import read_whole
from frugalpath.slides.extraction import extract_slides
from frugalpath.slides.images import slide_format
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.patch_encoder import PatchEncoder

APERIO = "Aperio Image Library v11.2.1\n"
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A slide of pink tissue as an Aperio scanner writes it, with a red label and a blue macro picture."""
    tissue = np.full((1024, 1024, 3), 240, np.uint8)
    tissue[200:800, 200:800] = (200, 120, 180)
    tissue[300:310, 200:800] = (150, 90, 170)
    path = tmp_path / "slide.svs"
    levels = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb", "metadata": None}
    extra = {"photometric": "rgb", "metadata": None, "rowsperstrip": 16}
    with tifffile.TiffWriter(path) as file:
        file.write(tissue, description=f"{APERIO}1024x1024 (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 1.0", **levels)
        file.write(tissue[::8, ::8], description=f"{APERIO}1024x1024 -> 128x128 - ", compression="jpeg", **extra)
        file.write(tissue[::4, ::4], description=f"{APERIO}1024x1024 (256x256) -> 256x256 JPEG/RGB Q=70", **levels)
        label = np.full((64, 64, 3), RED, np.uint8)
        file.write(label, description=f"{APERIO}label 64x64", subfiletype=1, compression="lzw", **extra)
        macro = np.full((64, 96, 3), BLUE, np.uint8)
        file.write(macro, description=f"{APERIO}macro 96x64", subfiletype=9, compression="jpeg", **extra)
    with openslide.OpenSlide(path) as slide:
        assert {"label", "macro"} <= set(slide.associated_images)
    return path


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = nn.functional.avg_pool2d(x, 32).permute(0, 2, 3, 1)
        return grid.mean((1, 2)), grid


def unlike_both(pixels: np.ndarray) -> bool:
    """Whether no pixel of uint8 (h, w, 3) is near the colour of the label or of the macro picture."""
    far = [np.abs(pixels.reshape(-1, 3).astype(int) - colour).max(1) > 60 for colour in (RED, BLUE)]
    return bool(np.all(far))


def test_nothing_written_comes_from_them(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(lambda _: pytest.fail("they were read")))
    encoder = PatchEncoder("mean", _Mean(), dim=3, stride=32, mean=(0, 0, 0), std=(1, 1, 1), fingerprint="m@1")
    out = tmp_path / "out"
    (status,) = extract_slides([labelled], out, ExtractOptions(mpp=1.0, tile_px=224), encoder=encoder, progress=False)
    assert status.status == "done", status.reason
    pictures = [path for path in out.rglob("*") if path.suffix in (".png", ".jpg", ".jpeg")]
    assert pictures and all(unlike_both(np.asarray(Image.open(path).convert("RGB"))) for path in pictures)
    shown = read_whole(str(labelled), slide=True)
    assert shown is not None and shown.shape[2] == 3 and unlike_both(shown)


def test_a_slide_is_no_field_of_view(labelled):
    """Read as a picture, a slide's file gives whatever stands first in it: with some scanners the macro picture."""
    assert slide_format(labelled) == "aperio"
    _, problems = inspect_files([str(labelled)], use_cache=False)
    assert "is a whole slide (aperio)" in problems[str(labelled)] and "under `slides`" in problems[str(labelled)]
