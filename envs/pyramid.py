"""Writes a picture as a tiled pyramidal TIFF that OpenSlide opens, in bounded memory.

The base level is drawn and written strip by strip; of the smaller levels only one strip of pixels and the compressed
tiles are held. Tiles are JPEG, the resolution is stored in pixels per centimetre (OpenSlide derives mpp from it).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from frugalpath.errors import InputError, extra
from frugalpath.files import atomic_write

TILE = 256


def write_pyramid(
    path: str | os.PathLike[str],
    draw: Callable[[int, int], np.ndarray],
    *,
    width: int,
    height: int,
    mpp: float,
    tile: int = TILE,
    strip: int = 4 * TILE,
    quality: int = 85,
) -> None:
    """Write a tiled pyramidal TIFF: levels 1, 2, 4, ... down to the first whose longer side fits in one tile.

    The file appears under its name only when it is complete.

    Args:
        path: the file, in a folder that exists.
        draw: `draw(top, rows)` gives the base pixels of full-width rows, uint8 (rows, width, 3).
        width, height: of the base level in pixels.
        mpp: micrometres per pixel of the base level.
        tile: side of a tile in pixels, a multiple of 16.
        strip: rows drawn at a time, a multiple of `tile`.
        quality: of the JPEG tiles, 1 to 100.

    Raises:
        InputError: a size or setting is out of range, or the extra `simulator` is not installed.
    """
    problems = []
    if width < 1 or height < 1:
        problems.append(f"{path}: a slide of {width} x {height} px cannot be written; give at least 1 px")
    if not mpp > 0:
        problems.append(f"{path}: mpp is {mpp}; give micrometres per pixel above 0")
    if tile < 16 or tile % 16 or strip < tile or strip % tile:
        problems.append(f"{path}: tile {tile} must be a multiple of 16 and strip {strip} a multiple of the tile")
    if not 1 <= quality <= 100:
        problems.append(f"{path}: JPEG quality is {quality}; give 1 to 100")
    if problems:
        raise InputError(problems)
    with extra("simulator", "writing slides (cases.name simulator, or mosaic of kind slide)"):
        import imagecodecs  # noqa: F401  the tiles are compressed with it
        import tifffile
    path = Path(path)
    levels = [_Level(width, height, tile, quality)]
    while max(levels[-1].width, levels[-1].height) > tile:
        levels.append(_Level((levels[-1].width + 1) // 2, (levels[-1].height + 1) // 2, tile, quality))
    with atomic_write(path) as part, tifffile.TiffWriter(part, bigtiff=width * height > 1 << 30) as tiff:
        for index, level in enumerate(levels):
            tiles = _base_tiles(levels, draw, strip) if index == 0 else iter(level.tiles)
            scale = 1e4 / (mpp * width / level.width), 1e4 / (mpp * height / level.height)
            tiff.write(
                tiles,
                shape=(level.height, level.width, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                resolution=scale,
                resolutionunit="CENTIMETER",
                subfiletype=int(index > 0),
                metadata=None,
                software="frugalpath simulator" if index == 0 else False,
            )


class _Level:
    """One level while it is written: a strip of rows that wait for a full row of tiles, and the tiles so far."""

    def __init__(self, width: int, height: int, tile: int, quality: int):
        self.width, self.height, self.tile, self.quality = width, height, tile, quality
        self.unpaired = np.empty((0, 0, 3), np.uint8)
        self.waiting: list[np.ndarray] = []
        self.tiles: list[bytes] = []

    def shrink(self, rows: np.ndarray, last: bool) -> np.ndarray:
        """Halve rows of the level above; an odd row waits for the next strip."""
        if len(self.unpaired):
            rows = np.concatenate([self.unpaired, rows])
        even = len(rows) if last else len(rows) // 2 * 2
        self.unpaired = rows[even:]
        return halve(rows[:even])

    def add(self, rows: np.ndarray, last: bool) -> None:
        """Take rows (n, width, 3); whole rows of tiles are compressed, and the rest too when nothing follows."""
        self.waiting.append(rows)
        if not last and sum(len(part) for part in self.waiting) < self.tile:
            return
        pixels = np.concatenate(self.waiting)
        done = len(pixels) if last else len(pixels) // self.tile * self.tile
        self.tiles.extend(self.encode(pixels[:done]))
        self.waiting = [pixels[done:]] if done < len(pixels) else []

    def encode(self, pixels: np.ndarray) -> Iterator[bytes]:
        """JPEG tiles of full-width rows, row by row; what lies past the edge repeats the last pixel."""
        import imagecodecs

        for top in range(0, len(pixels), self.tile):
            for left in range(0, self.width, self.tile):
                block = pixels[top : top + self.tile, left : left + self.tile]
                missing = self.tile - block.shape[0], self.tile - block.shape[1]
                if any(missing):
                    block = np.pad(block, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
                yield bytes(
                    imagecodecs.jpeg8_encode(
                        np.ascontiguousarray(block),
                        level=self.quality,
                        colorspace="RGB",
                        outcolorspace="YCBCR",
                        subsampling="420",
                    )
                )


def _base_tiles(levels: list[_Level], draw: Callable[[int, int], np.ndarray], strip: int) -> Iterator[bytes]:
    """Tiles of the base level as they are drawn; on the way each strip is halved into the smaller levels."""
    base = levels[0]
    for top in range(0, base.height, strip):
        pixels = draw(top, min(strip, base.height - top))
        last = top + strip >= base.height
        # Before the tiles are handed over: the writer does not come back after the last one.
        smaller = pixels
        for level in levels[1:]:
            smaller = level.shrink(smaller, last)
            level.add(smaller, last)
        yield from base.encode(pixels)


def halve(pixels: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels, (H, W, 3) uint8 to (ceil(H/2), ceil(W/2), 3); an odd edge repeats its last pixel."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    total = pixels[::2, ::2].astype(np.uint16)
    for rows, columns in ((1, 0), (0, 1), (1, 1)):
        total += pixels[rows::2, columns::2]
    return ((total + 2) >> 2).astype(np.uint8)
