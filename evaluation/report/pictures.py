"""Pictures of a case as shown to the performer: each image or slide in full, and at the budget."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from frugalpath.envs.case import Case
from frugalpath.models.feature_bank import VisualTokens
from frugalpath.models.image_view import ImageView
from frugalpath.models.performer import Performer
from frugalpath.slides.images import ImageError, read_image
from frugalpath.slides.reader import SlideReader
from frugalpath.slides.scale import SlideError

SIDE = 320
"""Longer side of a picture, in pixels."""
MOST_BYTES = 30_000
MOST_SHOWN = 3
"""Maximum number of pictured images or slides per case."""
EMPTY = 244
"""Grey level of areas without a token."""


@dataclass(frozen=True)
class Shown:
    """One image or slide of a case.

    Args:
        name: such as "slide 1".
        full, seen: JPEG of the full image, and of what was shown at the budget.
        tokens: realised visual tokens.
        note: how the second picture was made.
    """

    name: str
    full: bytes
    seen: bytes
    tokens: int
    note: str


class Pictures:
    """Makes the pictures of a run's cases.

    Args:
        performer: defines what is shown.
        cases: the run's cases.
    """

    def __init__(self, performer: Performer, cases: Sequence[Case]):
        self.performer = performer
        self.cases = {case.id: case for case in cases}

    def __call__(self, name: str, budget: int) -> list[Shown]:
        """Pictures of a case at a budget, without inputs that are only features or can no longer be read."""
        case = self.cases[name]
        made = []
        order = {str(source): number for number, source in enumerate((*case.images, *case.slides), 1)}
        for view in self.performer.see(case, budget)[:MOST_SHOWN]:
            assert isinstance(view, VisualTokens | ImageView)
            source = str(view.source)
            kind = "image" if source in case.images else "slide"
            pixels = read_whole(source, slide=kind == "slide")
            if pixels is None:
                continue
            seen, note = as_seen(view, pixels)
            made.append(Shown(f"{kind} {order[source]}", jpeg(pixels), jpeg(seen), view.tokens, note))
        return made


def read_whole(path: str, slide: bool) -> np.ndarray | None:
    """Read a full image or slide as uint8 (h, w, 3) of at most `SIDE` pixels; None if it has no pixels.

    Only the pyramid of a slide is read, never its label or macro image.
    """
    # A report on finished scores does not end for a picture that was moved since.
    if not slide:
        try:
            image = read_image(path)
        except ImageError:
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return np.asarray(image)
    if path.endswith(".h5"):
        return None
    try:
        with SlideReader(path) as reader:
            width, height = reader.level_dimensions[0]
            scale = SIDE / max(width, height)
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            level = reader.best_level(1 / scale)
            return reader.read(level, (0, 0, *reader.level_dimensions[level]), size)
    except SlideError:
        return None


def as_seen(view: VisualTokens | ImageView, pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """Pixels (h, w, 3) at the view's budget, and how the picture was made."""
    if isinstance(view, ImageView):
        image = view.image()
        return np.asarray(image), f"resized to {image.width} × {image.height} px"
    mosaic = mean_cells(pixels, view.rows[:, -4:-1].numpy())
    if view.realised is not None and view.realised != len(view.rows):
        return mosaic, f"{len(view.rows)} cells, of which learned layers make {view.tokens} tokens"
    return mosaic, "the image averaged over each token's cell"


def mean_cells(pixels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Mean colour of each token's cell, (h, w, 3) uint8; areas without a cell are grey.

    Args:
        pixels: (h, w, 3) uint8. places: (n, 3) centre x, centre y as shares of width and height, side as a share of
            the longer side. Cells of a grid that are not square are told by their nearest centre.
    """
    height, width = pixels.shape[:2]
    centres = places[:, :2] * (width, height)
    down, across = np.mgrid[:height, :width] + 0.5
    points = np.stack([across.ravel(), down.ravel()], 1)
    _, nearest = cKDTree(centres).query(points)
    # Nearly half a pixel more, or rounding would leave seams between cells.
    half = places[nearest, 2] * max(width, height) / 2 + 0.49
    covered = (np.abs(points - centres[nearest]) <= half[:, None]).all(1)
    flat = pixels.reshape(-1, 3).astype(np.float64)
    member, count = nearest[covered], np.bincount(nearest[covered], minlength=len(places))
    sums = np.stack([np.bincount(member, flat[covered, c], minlength=len(places)) for c in range(3)], 1)
    mean = sums / np.maximum(count, 1)[:, None]
    out = np.full_like(flat, EMPTY)
    out[covered] = mean[member]
    return out.round().astype(np.uint8).reshape(pixels.shape)


def jpeg(pixels: np.ndarray, most: int = MOST_BYTES) -> bytes:
    """Encode uint8 (h, w, 3) as JPEG of at most `SIDE` px and `most` bytes, reducing quality first, then size."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    while True:
        for quality in (85, 75, 60, 45):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most:
                return buffer.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)), Image.Resampling.LANCZOS)
