"""Count the tissue tiles of slides at several scales, without encoding them.

    frugalpath count --slides slides/ --setting 2.0:512 --setting 0.5:256

A setting is `mpp:tile_px`. Counts match `frugalpath extract` with the same `--mpp`, `--tile-px` and `--min-tissue`,
before `--max-tiles`. Slides scanned coarser than a setting are counted from their geometry and marked `upsampled`;
`extract` rejects them. Slides of all stains are counted. The last line of output is JSON. See docs/slides.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from frugalpath.errors import InputError, entry
from frugalpath.slides.extraction import find_grid
from frugalpath.slides.jobs import SlideJob, find_jobs
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.reader import SlideReader
from frugalpath.slides.scale import MAX_MPP, MIN_MPP, SlideError, find_scale, plausible
from frugalpath.slides.tiling import select, tissue_fraction


@dataclass(frozen=True)
class Setting:
    """Scale (microns per pixel) and side (pixels) of tiles."""

    mpp: float
    tile_px: int

    def __str__(self) -> str:
        return f"{self.mpp:g}:{self.tile_px}"


def parse_setting(text: str) -> Setting:
    """Parse `2.0:512`; raise InputError if it is invalid."""
    mpp, _, tile_px = text.partition(":")
    try:
        setting = Setting(float(mpp), int(tile_px))
    except ValueError:
        raise InputError(f"--setting {text}: expected mpp:tile_px, such as 2.0:512") from None
    if not plausible(setting.mpp) or setting.tile_px < 1:
        raise InputError(f"--setting {text}: mpp must be between {MIN_MPP} and {MAX_MPP:g}, tile_px at least 1")
    return setting


def count_tiles(job: SlideJob, settings: Sequence[Setting], options: ExtractOptions) -> dict[str, Any]:
    """Count the tissue tiles of one slide at each setting.

    Returns:
        `tiles` (count by setting), `area` (tissue area in tiles, by setting: the limit of the count for tiles that
        are small compared to the tissue), `mpp` (of level 0) and `upsampled` (settings finer than the slide).

    Raises:
        SlideError: the slide cannot be read, its scale is unknown, or it shows no tissue.
    """
    tiles: dict[str, int] = {}
    area: dict[str, float] = {}
    upsampled = []
    with SlideReader(job.file, options.backend, timeout=options.read_timeout) as reader:
        scale = find_scale(
            reader.properties, manifest_mpp=job.mpp, flag_mpp=options.slide_mpp, override=options.override_mpp
        )
        for setting in settings:
            own = dataclasses.replace(options, mpp=setting.mpp, tile_px=setting.tile_px)
            _, grid, mask = find_grid(reader, scale, job, own)
            fraction = tissue_fraction(grid, mask, reader.bounds)
            tiles[str(setting)] = len(select(fraction, options.min_tissue))
            area[str(setting)] = round(float(fraction.sum()), 2)
            if scale.mpp > setting.mpp * (1 + options.mpp_tolerance):
                upsampled.append(str(setting))
    return {"tiles": tiles, "area": area, "mpp": scale.mpp, "upsampled": upsampled}


def count_slides(jobs: Sequence[SlideJob], settings: Sequence[Setting], options: ExtractOptions) -> dict[str, Any]:
    """Count the tiles of all slides; also return totals, ratios, and the slides that failed with their reasons.

    `ratio` is the largest count over the smallest, per slide and for the totals; `area_ratio` is the same for areas.
    Both are None where the smallest is 0.
    """
    slides, failed = {}, {}
    for job in tqdm(jobs, desc="slides", unit="slide", disable=None, leave=False):
        try:
            found = count_tiles(job, settings, options)
        except SlideError as error:
            failed[job.id] = str(error)
        else:
            slides[job.id] = {**found, "ratio": _ratio(found["tiles"]), "area_ratio": _ratio(found["area"])}
    total, area = (
        {str(s): round(sum(found[key][str(s)] for found in slides.values()), 2) for s in settings}
        for key in ("tiles", "area")
    )
    return {"slides": slides, "failed": failed, "total": total, "ratio": _ratio(total), "area_ratio": _ratio(area)}


def _ratio(tiles: Mapping[str, float]) -> float | None:
    least = min(tiles.values())
    return round(max(tiles.values()) / least, 2) if least else None


def parse(arguments: list[str] | None = None) -> tuple[list[SlideJob], list[Setting], ExtractOptions]:
    """Parse slides, settings and options from the command line."""
    default = ExtractOptions()
    parser = argparse.ArgumentParser(prog="frugalpath count", description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", required=True, help="folder, manifest or one slide")
    parser.add_argument("--setting", action="append", required=True, help="mpp:tile_px, such as 2.0:512; repeatable")
    parser.add_argument("--min-tissue", type=float, default=default.min_tissue, help="tissue fraction, as in extract")
    parser.add_argument("--slide-mpp", type=float, help="level-0 mpp of slides that record none, as in extract")
    parser.add_argument("--override-mpp", action="store_true", help="prefer --slide-mpp over the file, as in extract")
    parser.add_argument("--dark-background", action="store_true", help="read fluorescence too, as in extract")
    parser.add_argument("--allow-outside", action="store_true", help="allow manifest paths outside its folder")
    found = parser.parse_args(arguments)
    settings = list(dict.fromkeys(map(parse_setting, found.setting)))
    options = dataclasses.replace(
        default,
        min_tissue=found.min_tissue,
        slide_mpp=found.slide_mpp,
        override_mpp=found.override_mpp,
        dark_background=found.dark_background,
    )
    options.check()
    return find_jobs(found.slides, allow_outside=found.allow_outside), settings, options


@entry
def main() -> None:
    """Run the command line; exit with status 2 for bad arguments or if no slide could be counted."""
    jobs, settings, options = parse()
    counted = count_slides(jobs, settings, options)
    for name, found in counted["slides"].items():
        notes = f"  upsampled: {', '.join(found['upsampled'])}" if found["upsampled"] else ""
        tiles = "  ".join(f"{setting} {n}" for setting, n in found["tiles"].items())
        print(f"{name}  {found['mpp']:.4g} mpp  {tiles}  ratio {found['ratio']} (area {found['area_ratio']}){notes}")
    for name, reason in counted["failed"].items():
        print(f"{name}  not counted: {reason}")
    if not counted["slides"]:
        raise InputError(f"--slides: none of {len(jobs)} slides could be counted, for the reasons above")
    print(json.dumps(counted, ensure_ascii=False))


if __name__ == "__main__":
    main()
