"""Read ahead: threads read and resample blocks of a slide while the encoder processes earlier ones."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch

from frugalpath.errors import InputError
from frugalpath.slides.patch_encoder import PatchEncoder
from frugalpath.slides.reader import MAX_READ, BackendError, SlideReader, resample
from frugalpath.slides.scale import SlideError
from frugalpath.slides.tiling import Block, Grid, blocks

Item = TypeVar("Item")
Result = TypeVar("Result")

# Side of a block in tiles. Larger blocks share more of the file's own tiles, smaller ones spread over more threads.
BLOCK_SIDE = 4
# A level of more pixels than this is not searched for tissue: a file that claims to be that large and has no pyramid
# would be read for a quarter of an hour and more.
MAX_SEARCH = 2**35


def read_ahead(
    call: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    timeout: float | None = None,
    on_stuck: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """`map(call, items)` on threads, in order, a few results ahead.

    A call that does not return within `timeout` seconds, where one is given, raises TimeoutError. Its thread is a
    daemon, given up so that neither the run nor the end of the process waits for it: fastslide 0.8 never returns from
    a tile that is no JPEG.
    `on_stuck` is called when a thread is left behind, still at work.
    """
    tasks: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            future, item = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(item))
                except BaseException as error:
                    future.set_exception(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    pending: deque[Future[Result]] = deque()
    patience = timeout
    try:
        for item in items:
            future: Future[Result] = Future()
            tasks.put((future, item))
            pending.append(future)
            if len(pending) > workers + 2:
                yield pending.popleft().result(timeout)
        while pending:
            yield pending.popleft().result(timeout)
    except TimeoutError:
        patience = 0.0
        raise
    finally:
        for future in pending:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        # Whoever closes the slide next must not do so under a thread that still reads it.
        for thread in threads:
            thread.join(patience)
        if any(thread.is_alive() for thread in threads):
            on_stuck()


def read_thumbnail(reader: SlideReader, ratio: float, workers: int, timeout: float) -> np.ndarray:
    """The scanned part of a slide reduced by `ratio`, put together from region reads of bounded size.

    Args:
        reader: an open slide.
        ratio: level-0 pixels per pixel of the thumbnail.
        workers: reading threads.
        timeout: seconds that one read may take.

    Returns:
        uint8 (h, w, 3).

    Raises:
        SlideError: damaged, does not answer, or a single level too large to search.
    """
    x, y, width, height = reader.bounds
    level = reader.best_level(ratio)
    down = reader.level_downsamples[level]
    if width * height / down**2 > MAX_SEARCH:
        raise SlideError(
            f"level {level} of {width / down:.0f} x {height / down:.0f} px is the coarsest to look for tissue in: too "
            "large; write the slide with a pyramid, e.g. vips tiffsave --tile --pyramid"
        )
    columns, rows = max(1, round(width / ratio)), max(1, round(height / ratio))
    image = np.empty((rows, columns, 3), np.uint8)
    side = max(1, int((MAX_READ / 4 * columns * rows / (width * height / down**2)) ** 0.5))
    parts = [
        (left, top, min(left + side, columns), min(top + side, rows))
        for top in range(0, rows, side)
        for left in range(0, columns, side)
    ]

    def read(part: tuple[int, int, int, int]) -> np.ndarray:
        left, top, right, bottom = part
        across, along = width / down / columns, height / down / rows
        box = (
            round(x / down + left * across),
            round(y / down + top * along),
            round(x / down + right * across),
            round(y / down + bottom * along),
        )
        return reader.read(level, box, (right - left, bottom - top))

    for (left, top, right, bottom), pixels in zip(parts, _guarded(reader, read, parts, workers, timeout), strict=True):
        image[top:bottom, left:right] = pixels
    return image


def read_tiles(
    reader: SlideReader, level: int, grid: Grid, tiles: np.ndarray, tile_px: int, workers: int, timeout: float
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Read tiles in blocks, ahead of their use.

    A tile is the square of whole pixels of the level that is nearest to its place in the grid, resampled: it is off by
    half a pixel of the level at most, and so is its side (0.25 % of a 224 px tile), whatever block it was read in.

    Args:
        reader: an open slide.
        level: the level to read from.
        grid: where the tiles are.
        tiles: (N, 2) row and column of the wanted ones.
        tile_px: side of a tile in the result.
        workers: reading threads.
        timeout: seconds that one block may take.

    Yields:
        (n, 2) row and column, and uint8 (n, tile_px, tile_px, 3). Every wanted tile comes once.
    """
    down = reader.level_downsamples[level]
    native = max(1, round(grid.step / down))
    side = int(max(1, min(BLOCK_SIDE, MAX_READ**0.5 / native)))
    size = (tile_px, tile_px)

    def corner(row: int, column: int) -> tuple[int, int]:
        return round((grid.left + column * grid.step) / down), round((grid.top + row * grid.step) / down)

    def read(block: Block) -> tuple[np.ndarray, np.ndarray]:
        left, top = corner(block.row, block.column)
        right, bottom = corner(block.row + block.rows - 1, block.column + block.columns - 1)
        if len(block.tiles) == 1:
            images = [reader.read(level, (left, top, left + native, top + native), size)]
            return block.tiles, np.stack(images)
        pixels = reader.native(level, left, top, right + native - left, bottom + native - top)
        images = []
        for row, column in block.tiles.tolist():
            x, y = corner(row, column)
            images.append(resample(pixels[y - top : y - top + native, x - left : x - left + native], size))
        return block.tiles, np.stack(images)

    yield from _guarded(reader, read, blocks(tiles, side), workers, timeout)


def encode_tiles(encoder: PatchEncoder, tiles: np.ndarray, cells: int) -> np.ndarray:
    """Encode tiles, uint8 (n, px, px, 3) -> float32 (n * cells ** 2, dim), the cells of a tile row by row."""
    if cells == 1:
        return encoder.encode(torch.from_numpy(tiles)).cpu().numpy()
    grid = encoder.feature_map(torch.from_numpy(tiles))
    count, side, _, dim = grid.shape
    grid = grid.reshape(count, cells, side // cells, cells, side // cells, dim).mean((2, 4))
    return grid.reshape(-1, dim).cpu().numpy()


def check_tile(encoder: PatchEncoder, tile_px: int, cells: int) -> None:
    """Raise InputError if the encoder cannot take tiles of this size or its map cannot be cut into cells."""
    if tile_px <= 0 or tile_px % encoder.stride:
        raise InputError(f"--tile-px {tile_px}: {encoder.name} takes multiples of {encoder.stride}")
    side = tile_px // encoder.stride
    if cells < 1 or side % cells:
        divisors = ", ".join(str(n) for n in range(1, side + 1) if side % n == 0)
        raise InputError(
            f"--cells {cells}: the map of a {tile_px} px tile is {side} x {side}: choose one of {divisors}"
        )


def _guarded(
    reader: SlideReader, call: Callable[[Item], Result], items: Iterable[Item], workers: int, timeout: float
) -> Iterator[Result]:
    try:
        yield from read_ahead(call, items, workers, timeout, on_stuck=reader.give_up)
    except TimeoutError as error:
        kind = BackendError if reader.backend == "fastslide" else SlideError
        raise kind(f"{reader.backend} did not answer for {timeout:g} s: the file may be damaged") from error
