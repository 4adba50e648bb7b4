"""The files of mosaics: which tiles go where, drawing, and writing what is not there yet."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from frugalpath.envs.case import SPLITS
from frugalpath.envs.mosaic_layout import Layout, case_kinds, draw_layouts
from frugalpath.envs.pyramid import write_pyramid
from frugalpath.errors import InputError
from frugalpath.files import atomic_write, write_text
from frugalpath.slides.images import ImageError, read_image

LAYOUTS, TILES, ASKED, CASES = 1, 2, 3, 4
"""First number of each seed, so that no two things drawn share a stream."""
_GLASS = 242  # grey of the empty glass around a slide's tissue


@dataclass(frozen=True, eq=False)
class Mosaic:
    """One mosaic: its layout, and for each cell of the grid, row by row, the tile (path) and its turn (0..7)."""

    split: str
    number: int
    layout: Layout
    tiles: tuple[str, ...]
    turns: tuple[int, ...]


def plan_mosaics(record: Mapping[str, Any], pools: Mapping[tuple[str, str], Sequence[str]]) -> list[Mosaic]:
    """All mosaics: what lies where, and which tiles they are made of."""
    seed, plan = record["seed"], []
    for split, number in record["mosaics"].items():
        stream = seed, SPLITS.index(split)
        sides = tuple(record["region_tiles"])
        size = record.get("slides_per_case", 1)
        kinds = case_kinds(number // size, size, (CASES, *stream)) if size > 1 else None
        layouts = draw_layouts(
            number, record["grid"], sides, record["background"], record["lesion"], (LAYOUTS, *stream), kinds
        )
        for i, layout in enumerate(layouts):
            rng = np.random.default_rng([TILES, *stream, i])
            chosen = np.empty(layout.lesion.size, object)
            for label, where in ((layout.lesion_label, layout.lesion), (layout.background, ~layout.lesion)):
                cells = np.flatnonzero(where)
                pool = pools[split, label]
                # Every tile once before any comes again.
                rounds = [rng.permutation(len(pool)) for _ in range(-(-len(cells) // len(pool)))]
                for cell, tile in zip(cells, np.concatenate(rounds) if rounds else [], strict=False):
                    chosen[cell] = pool[tile]
            turns = rng.integers(8, size=layout.lesion.size).tolist()
            plan.append(Mosaic(split, i, layout, tuple(chosen), tuple(turns)))
    return plan


def write_mosaics(plan: Sequence[Mosaic], home: Path, record: Mapping[str, Any], workers: int) -> list[Path]:
    """Write what is missing; the file of each mosaic."""
    suffix = ".jpg" if record["kind"] == "field" else ".tiff"
    files = [home / f"{record['kind']}s" / mosaic.split / f"{mosaic.number:05d}{suffix}" for mosaic in plan]
    for parent in {file.parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)
    missing = [(mosaic, file) for mosaic, file in zip(plan, files, strict=True) if not file.is_file()]
    tile = functools.lru_cache(maxsize=4096)(functools.partial(_read_tile, side=record["tile_px"]))

    def write(item: tuple[Mosaic, Path]) -> None:
        mosaic, file = item
        side, margin = record["tile_px"], record["margin"]
        size = (record["grid"] + 2 * margin) * side
        draw = functools.partial(draw_rows, mosaic, tile, side, margin)
        if record["kind"] == "slide":
            write_pyramid(file, draw, width=size, height=size, mpp=record["mpp"], quality=record["quality"])
            return
        with atomic_write(file) as part:
            Image.fromarray(draw(0, size)).save(part, "JPEG", quality=record["quality"])

    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(
            pool.map(write, missing), total=len(missing), desc="mosaics", disable=len(missing) < 50, leave=False
        ):
            pass
    return files


def draw_rows(
    mosaic: Mosaic, tile: Callable[[str], np.ndarray], side: int, margin: int, top: int, rows: int
) -> np.ndarray:
    """Rows `top` to `top + rows` of a mosaic over its full width, uint8 (rows, width, 3).

    Args:
        mosaic: what to draw.
        tile: gives the pixels of a tile's path, uint8 (side, side, 3).
        side: pixels of a tile.
        margin: tiles of glass around it.
    """
    grid = len(mosaic.layout.lesion)
    pixels = np.full((rows, (grid + 2 * margin) * side, 3), _GLASS, np.uint8)
    for row in range(grid):
        start = (row + margin) * side
        low, high = max(top, start), min(top + rows, start + side)
        if low >= high:
            continue
        for column in range(grid):
            cell = row * grid + column
            drawn = _turn(tile(mosaic.tiles[cell]), mosaic.turns[cell])
            left = (column + margin) * side
            pixels[low - top : high - top, left : left + side] = drawn[low - start : high - start]
    return pixels


def _read_tile(path: str, side: int) -> np.ndarray:
    try:
        pixels = read_image(path)
    except ImageError as error:
        raise InputError(f"{path} {error}") from error
    return np.asarray(pixels if pixels.width == side else pixels.resize((side, side), Image.Resampling.LANCZOS))


def _turn(pixels: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight ways a square can lie."""
    pixels = np.rot90(pixels, turn % 4)
    return pixels[:, ::-1] if turn >= 4 else pixels


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line; the file appears whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
