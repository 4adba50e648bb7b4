"""Quality control of a slide: a picture with tissue outline and tiles, and GeoJSON for QuPath."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from frugalpath.files import atomic_write, write_text
from frugalpath.slides.tiling import Grid

LONGEST_SIDE = 1600
_OUTLINE, _TILE = (0, 150, 60), (30, 60, 220)


def qc_picture(
    thumbnail: np.ndarray, mask: np.ndarray, grid: Grid, tiles: np.ndarray, bounds: tuple[int, int, int, int]
) -> Image.Image:
    """Draw the outline of the tissue (green) and the kept tiles (blue) on the thumbnail.

    Args:
        thumbnail: uint8 (h, w, 3) over `bounds`.
        mask: bool (h, w).
        grid: the tiles' grid.
        tiles: (N, 2) row and column of the kept ones.
        bounds: x, y, width, height at level 0, px.
    """
    image = Image.fromarray(thumbnail)
    scale = LONGEST_SIDE / max(image.size)
    if scale < 1 or scale > 2:  # a small slide is enlarged, so that the lines can be told apart
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    scale_x, scale_y = image.width / bounds[2], image.height / bounds[3]
    draw = ImageDraw.Draw(image, "RGBA")
    for row, column in tiles.tolist():
        x, y = column * grid.step * scale_x, row * grid.step * scale_y
        box = (x, y, x + grid.step * scale_x - 1, y + grid.step * scale_y - 1)
        draw.rectangle(box, outline=(*_TILE, 200), fill=(*_TILE, 24))
    zoom = image.width / mask.shape[1], image.height / mask.shape[0]
    for ring in (ring for polygon in _polygons(mask) for ring in polygon):
        draw.line([(x * zoom[0], y * zoom[1]) for x, y in ring], fill=(*_OUTLINE, 255), width=3)
    return image


def write_picture(path: Path, image: Image.Image) -> None:
    """Write a JPEG atomically."""
    with atomic_write(path) as part:
        image.save(part, "JPEG", quality=85)


def write_geojson(
    path: Path, name: str, mask: np.ndarray, grid: Grid, tiles: np.ndarray, bounds: tuple[int, int, int, int]
) -> None:
    """Write tissue outlines and tiles as GeoJSON, which QuPath opens by drag and drop.

    Positions are pixels of level 0 from the corner of `bounds`: QuPath shows a slide cropped to them.
    """
    scale = np.array([bounds[2] / mask.shape[1], bounds[3] / mask.shape[0]])
    features = [
        _feature(f"{name}/tissue/{i}", [(ring * scale).round(1).tolist() for ring in polygon], "annotation", _OUTLINE)
        for i, polygon in enumerate(_polygons(mask))
    ]
    for row, column in tiles.tolist():
        left, top = column * grid.step, row * grid.step
        right, bottom = left + grid.step, top + grid.step
        ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
        corners = [[round(x, 1), round(y, 1)] for x, y in ring]
        features.append(_feature(f"{name}/tile/{row}/{column}", [corners], "tile", _TILE))
    write_text(path, json.dumps({"type": "FeatureCollection", "features": features}))


def _feature(key: str, rings: list[Any], kind: str, colour: tuple[int, int, int]) -> dict[str, Any]:
    label = "Tissue" if kind == "annotation" else "Tile"
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, key)),
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {"objectType": kind, "classification": {"name": label, "color": list(colour)}},
    }


def _polygons(mask: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Each piece of tissue as rings of (x, y) in pixels of the mask: the outline first, then the holes."""
    labels, _ = ndimage.label(mask)
    for index, window in enumerate(ndimage.find_objects(labels), start=1):
        piece = labels[window] == index
        filled = ndimage.binary_fill_holes(piece)
        corner = np.array([window[1].start, window[0].start])
        outline = _rings(filled)
        if outline:
            yield [ring + corner for ring in outline[:1] + _rings(filled & ~piece)]


def _rings(mask: np.ndarray) -> list[np.ndarray]:
    """Closed contours, the longest first; a pixel covers [i, i + 1)."""
    # Fully connected: a piece whose pixels touch at corners alone stays one ring.
    contours = find_contours(np.pad(mask, 1).astype(np.float32), 0.5, fully_connected="high")
    contours.sort(key=len, reverse=True)
    simplified = [approximate_polygon(contour, 0.4)[:, ::-1] - 0.5 for contour in contours]
    return [ring for ring in simplified if len(ring) >= 4]
