"""Tiles a second of the slide pipeline against a plain openslide-python loop, on a 40x pyramid written here.

    python benchmarks/ingest.py

The peer is the loop of CLAM and TRIDENT: in one thread, for each tile, `read_region` on the best level,
`convert("RGB")` and a PIL resize to 224 px. Ours reads the same tiles of the same file as `slides.extract` does:
blocks of tiles, two reading threads. Both resize by the same filter. `*_ratio` are times of reading alone, peer over
ours; `end_to_end_*_ratio` add the encoder, which both share: the peer reads a batch, then encodes it; ours reads
ahead.

The pyramid has the levels 1, 4 and 16 of a scanner, JPEG tiles of 256 px, and sides that are multiples of 16, so that
the levels are scaled by whole numbers. That favours the peer: where they are not (most real slides), OpenSlide
interpolates each pixel, which takes it four times as long. `--odd` writes such a pyramid, `--slide` takes a slide of
your own.

Repeats are interleaved; the printed JSON line holds the median of the ratios of each repeat. `fastslide_ratio` needs
the extra `fast` and is null without it. `others_busy` is the fraction of the cores' time that other processes took
meanwhile: above a few per cent the second reading thread had no core of its own, and the ratios are too low.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as frugalpath.slides.extract does

import numpy as np
import openslide
import psutil
import tifffile
import torch
from PIL import Image
from scipy import ndimage

from frugalpath.errors import InputError, entry
from frugalpath.slides.encoder import load_encoder
from frugalpath.slides.extraction import batches
from frugalpath.slides.patch_encoder import PatchEncoder
from frugalpath.slides.reader import SlideReader
from frugalpath.slides.scale import find_scale
from frugalpath.slides.stream import encode_tiles, read_tiles
from frugalpath.slides.tiling import make_grid

MPP, TILE_PX, BATCH, NATIVE = 2.0, 224, 64, 256


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=16, help="5x tiles across the pyramid")
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2, help="cores that the whole benchmark may use")
    parser.add_argument(
        "--encode-tiles", type=int, default=128, help="tiles of the end-to-end runs; 0 leaves them out"
    )
    parser.add_argument("--odd", action="store_true", help="level sizes that are no whole multiples of each other")
    parser.add_argument("--slide", help="measure on this slide instead of a written one")
    return parser.parse_args()


def write_pyramid(path: Path, columns: int, rows: int, odd: bool) -> None:
    """Write a tiled JPEG pyramid of tissue-like texture at 0.25 mpp with levels 1, 4 and 16, in bounded memory."""
    rng = np.random.default_rng(0)
    side = 1024
    stain = np.array([[214, 160, 200], [110, 70, 150]], np.float32)
    # Nuclei of 6 microns on a mottled ground, with the noise of a camera: JPEG tiles of 20 to 30 kB, like tissue.
    nuclei = ndimage.gaussian_filter(rng.normal(size=(side, side)).astype(np.float32), 9, mode="wrap")
    ground = ndimage.gaussian_filter(rng.normal(size=(side, side)).astype(np.float32), 60, mode="wrap")
    density = np.clip(0.25 + 0.9 * (nuclei / nuclei.std() > 1.2) + 0.12 * ground / ground.std(), 0, 1)
    density = ndimage.gaussian_filter(density, 1.5, mode="wrap")[..., None]
    texture = stain[0] * (1 - density) + stain[1] * density + rng.normal(scale=6, size=(side, side, 3))
    base = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
    step = round(TILE_PX * MPP / 0.25)
    width, height = columns * step + 13 * odd, rows * step + 11 * odd
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level, down in enumerate((1, 4, 16)):
            # The texture repeats; each level shows it smaller, as a scanner's would.
            image = np.asarray(base.resize((side // down, side // down), Image.Resampling.BOX))
            shape = (height // down, width // down, 3)
            writer.write(
                _native_tiles(image, shape),
                shape=shape,
                dtype=np.uint8,
                tile=(NATIVE, NATIVE),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                resolution=(1e4 / (0.25 * down), 1e4 / (0.25 * down)),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
            )


def _native_tiles(image: np.ndarray, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    side = len(image)
    for top in range(0, shape[0], NATIVE):
        rows = (top + np.arange(NATIVE)) % side
        for left in range(0, shape[1], NATIVE):
            yield image[rows[:, None], (left + np.arange(NATIVE)) % side]


def plain_loop(path: str, tiles: list[tuple[int, int]], step: float, encoder: PatchEncoder | None) -> int:
    """The peer; the number of tiles read."""
    slide = openslide.OpenSlide(path)
    level = slide.get_best_level_for_downsample(step / TILE_PX)
    side = round(step / slide.level_downsamples[level])
    batch: list[np.ndarray] = []
    count = 0
    for x, y in tiles:
        tile = slide.read_region((x, y), level, (side, side)).convert("RGB")
        batch.append(np.asarray(tile.resize((TILE_PX, TILE_PX), Image.Resampling.BILINEAR)))
        count += 1
        if len(batch) == BATCH or count == len(tiles):
            images = np.stack(batch)
            if encoder is not None:
                encoder.encode(images)
            batch.clear()
    slide.close()
    return count


def ours(path: str, backend: str, places: np.ndarray, encoder: PatchEncoder | None, workers: int) -> int:
    """The pipeline of `frugalpath.slides.extract`, without the tissue mask and the store; the number of tiles read."""
    count = 0
    with SlideReader(path, backend) as reader:
        mpp = find_scale(reader.properties).mpp
        grid = make_grid(reader.bounds, mpp, MPP, TILE_PX)
        level = reader.best_level(MPP / mpp, 0.1)
        for found, images in batches(read_tiles(reader, level, grid, places, TILE_PX, workers, 120.0), BATCH):
            if encoder is not None:
                encode_tiles(encoder, images, 1)
            count += len(found)
    return count


def seconds(call: Callable[[], int], expected: int) -> float:
    """How long a call takes; it must have read every tile."""
    start = time.perf_counter()
    if call() != expected:
        raise RuntimeError(f"not all of {expected} tiles were read")
    return time.perf_counter() - start


def measure(path: str, arguments: argparse.Namespace) -> dict[str, object]:
    """All timings of one slide, interleaved."""
    with SlideReader(path, "openslide") as reader:
        mpp = find_scale(reader.properties).mpp
        grid = make_grid(reader.bounds, mpp, MPP, TILE_PX)
        downsamples = [round(down, 4) for down in reader.level_downsamples]
    # Whole tiles only: the peer would read the slide's edge as black.
    columns, rows = (int(side // grid.step) for side in reader.bounds[2:])
    places = np.argwhere(np.ones((rows, columns), bool))
    backends = ["openslide"]
    try:
        SlideReader(path, "fastslide").close()
        backends.append("fastslide")
    except InputError as error:
        print(error, file=sys.stderr)
    result: dict[str, object] = {"openslide_ratio": None, "fastslide_ratio": None}
    stages: list[tuple[str, np.ndarray, PatchEncoder | None]] = [("", places, None)]
    if arguments.encode_tiles:
        stages.append(("end_to_end_", places[: arguments.encode_tiles], load_encoder()))
    for prefix, some, encoder in stages:
        corners = [(int(x), int(y)) for x, y in grid.coords(some)]
        calls: dict[str, Callable[[], int]] = {"plain": partial(plain_loop, path, corners, grid.step, encoder)}
        for backend in backends:
            calls[backend] = partial(ours, path, backend, some, encoder, arguments.cores)
        times = interleaved(calls, arguments.repeats, len(some))
        for backend in backends:
            ratios = [plain / own for plain, own in zip(times["plain"], times[backend], strict=True)]
            result[f"{prefix}{backend}_ratio"] = round(statistics.median(ratios), 3)
            result[f"{prefix}{backend}_ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        speeds = {key: round(len(some) / statistics.median(values), 1) for key, values in times.items()}
        result |= {f"{prefix}tiles_per_s": speeds, f"{prefix}tiles": len(some)}
    return result | {"n": len(places), "level_downsamples": downsamples}


def interleaved(calls: dict[str, Callable[[], int]], repeats: int, expected: int) -> dict[str, list[float]]:
    """Seconds of each call in each repeat. The first round, which fills the caches, does not count."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        first = repeat % len(calls)  # each round starts with another one
        for key in [*calls, *calls][first : first + len(calls)]:
            taken = seconds(calls[key], expected)
            if repeat:
                times[key].append(taken)
    return times


def used(cores: list[int]) -> tuple[float, float, float]:
    """Seconds that these cores worked, that this process worked, and that passed."""
    times = psutil.cpu_times(percpu=True)
    busy = sum(sum(times[core]) - times[core].idle - getattr(times[core], "iowait", 0.0) for core in cores)
    return busy, time.process_time(), time.perf_counter()


@entry
def main() -> None:
    """Write the pyramid, measure, print one JSON line."""
    arguments = parse()
    cores = list(range(psutil.cpu_count() or 1))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(arguments.cores)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.slide
        if path is None:
            path = str(Path(folder) / "pyramid.tiff")
            write_pyramid(Path(path), arguments.columns, arguments.rows, arguments.odd)
        before = used(cores)
        result = measure(path, arguments)
        busy, own, wall = (now - then for now, then in zip(used(cores), before, strict=True))
    result["others_busy"] = round(max(0.0, busy - own) / (wall * len(cores)), 3)
    try:
        import fastslide

        fast_version = fastslide.__version__
    except ImportError:
        fast_version = None
    result |= {
        "repeats": arguments.repeats,
        "statistic": "median",
        "cores": arguments.cores,
        "slide": "own" if arguments.slide else "written",
        "versions": {
            "python": platform.python_version(),
            "openslide": openslide.__library_version__,
            "openslide-python": openslide.__version__,
            "fastslide": fast_version,
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
