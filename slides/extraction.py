"""Extract feature files from slides: scale, tissue, tiles, encoder and store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from tqdm import tqdm

from frugalpath.errors import InputError
from frugalpath.slides.content import usable_cores
from frugalpath.slides.encoder import load_encoder
from frugalpath.slides.jobs import SlideJob, as_jobs, stain_key
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.patch_encoder import PatchEncoder
from frugalpath.slides.qc import qc_picture, write_geojson, write_picture
from frugalpath.slides.reader import BackendError, SlideReader
from frugalpath.slides.scale import Scale, SlideError, find_scale
from frugalpath.slides.status import DONE, FAILED, SKIPPED, SlideStatus, file_identity, read_status, write_status
from frugalpath.slides.store import FeatureWriter
from frugalpath.slides.stream import check_tile, encode_tiles, read_thumbnail, read_tiles
from frugalpath.slides.tiling import Grid, cap, make_grid, select, tissue_fraction
from frugalpath.slides.tissue import find_tissue

# Longest side of the thumbnail that is searched for tissue, px, and its finest resolution in parts of a tile.
MASK_SIDE, MASK_PARTS = 4096, 32


class Outputs:
    """Paths of a slide's outputs in the output folder."""

    def __init__(self, out: str | Path):
        self.out = Path(out)

    def features(self, key: str) -> Path:
        """Path of the feature file."""
        return self.out / "features" / f"{key}.h5"

    def status(self, key: str) -> Path:
        """Path of the status file."""
        return self.out / "status" / f"{key}.json"

    def picture(self, key: str) -> Path:
        """Path of the QC picture."""
        return self.out / "qc" / f"{key}.jpg"

    def geojson(self, key: str) -> Path:
        """Path of the GeoJSON file with tissue and tiles for QuPath."""
        return self.out / "geojson" / f"{key}.geojson"


def extract_slides(
    slides: Iterable[SlideJob | str | Path],
    out: str | Path,
    options: ExtractOptions | None = None,
    *,
    encoder: PatchEncoder | None = None,
    device: str = "auto",
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> list[SlideStatus]:
    """Extract the features of slides; results already in `out` are reused.

    Args:
        slides: jobs or paths.
        out: output folder: `features/<id>.h5`, `status/<id>.json`, `qc/<id>.jpg`, `geojson/<id>.geojson`.
        options: see `ExtractOptions`.
        encoder: a loaded encoder; by default `options.encoder` is loaded when needed.
        device: where the encoder runs, see `frugalpath.slides.encoder.load_encoder`.
        rank, world: this process takes one of `world` shares of the slides.
        progress: show progress bars.

    Returns:
        The status of each slide of this share, in order. A slide that cannot be read has the status failed and does
        not stop the others.

    Raises:
        InputError: invalid options, duplicate slide ids, or features in `out` made with other options.
    """
    options = options or ExtractOptions()
    options.check()
    jobs = as_jobs(slides)
    outputs = Outputs(out)
    identity = options.identity()
    found = {job.id: read_status(outputs.status(job.id)) for job in jobs}
    _check_out(outputs, jobs, found, identity, options)
    statuses = {}
    todo = []
    for job in _share(jobs, rank, world):
        before = found[job.id]
        if before is not None and _stands(before, job, outputs, identity, options):
            before.again = True
            statuses[job.id] = before
        else:
            todo.append(job)
    run = _Run(outputs, options, identity, encoder, device, progress)
    bar = tqdm(todo, desc="slides", unit="slide", disable=None if progress else True, leave=False)
    for job in bar:
        statuses[job.id] = run.extract(job)
    return [statuses[job.id] for job in jobs if job.id in statuses]


def _share(jobs: Sequence[SlideJob], rank: int, world: int) -> list[SlideJob]:
    """This process's share of slides, balanced by file size."""
    if world == 1:
        return list(jobs)
    sizes = {job.id: job.file.stat().st_size if job.file.is_file() else 0 for job in jobs}
    ordered = sorted(jobs, key=lambda job: (-sizes[job.id], job.id))
    turns = [*range(world), *reversed(range(world))]
    return [job for i, job in enumerate(ordered) if turns[i % len(turns)] == rank]


def _check_out(
    outputs: Outputs,
    jobs: Sequence[SlideJob],
    found: dict[str, SlideStatus | None],
    identity: dict[str, Any],
    options: ExtractOptions,
) -> None:
    """Raise InputError if the folder holds features made with other options."""
    if options.overwrite:
        return
    others = [s for s in found.values() if s is not None and s.status == DONE and s.options != identity]
    if others:
        then = others[0].options
        changed = [
            f"{key} {then.get(key)} -> {value}"
            for key, value in identity.items()
            if key != "encoder_files" and then.get(key) != value
        ]
        raise InputError(
            f"{outputs.out}: {len(others)} of {len(jobs)} slides were extracted with other options "
            f"({', '.join(changed) or 'the files of the encoder changed'}): choose another --out, or replace them "
            "with --overwrite"
        )


def _inputs(job: SlideJob, options: ExtractOptions) -> dict[str, Any]:
    """What the result of a slide depends on besides the options' identity."""
    return {
        "file": file_identity(job.file),
        "mpp": [job.mpp, options.slide_mpp, options.override_mpp],
        "stain": [stain_key(job.stain), sorted(stain_key(stain) for stain in options.stains)],
    }


def _stands(
    before: SlideStatus, job: SlideJob, outputs: Outputs, identity: dict[str, Any], options: ExtractOptions
) -> bool:
    """Whether the result of an earlier run is still valid."""
    now = _inputs(job, options)
    if before.status == DONE:
        if not outputs.features(job.id).is_file() or before.options != identity or _unwanted(job, options):
            return False
        # Settings for slides without a scale do not matter to one that records its own.
        recorded = (before.mpp_source or "").startswith("openslide.") and not options.override_mpp
        same_mpp = recorded or before.inputs.get("mpp") == now["mpp"]
        return same_mpp and before.inputs.get("file") == now["file"]
    if options.retry and before.status == FAILED:
        return False
    return before.options == identity and before.inputs == now


def _unwanted(job: SlideJob, options: ExtractOptions) -> str:
    """Reason to skip a slide by its stain, or an empty text."""
    wanted = {stain_key(stain) for stain in options.stains}
    if not job.stain or wanted & {"any", "all", stain_key(job.stain)}:
        return ""
    asked = " ".join(options.stains)
    return f"stain {job.stain} is not selected (--stains {asked}); add it, or use --stains any"


class _Run:
    """One run over a list of slides."""

    def __init__(
        self,
        outputs: Outputs,
        options: ExtractOptions,
        identity: dict[str, Any],
        encoder: PatchEncoder | None,
        device: str,
        progress: bool,
    ):
        self.outputs, self.options, self.identity = outputs, options, identity
        self.device, self.progress = device, progress
        self.backend = options.backend
        self._encoder = encoder
        if encoder is not None:
            check_tile(encoder, options.tile_px, options.cells)

    @property
    def encoder(self) -> PatchEncoder:
        """Encoder, loaded at first use."""
        if self._encoder is None:
            options = self.options
            self._encoder = load_encoder(
                options.encoder,
                revision=options.encoder_revision,
                trust_remote_code=options.trust_remote_code,
                device=self.device,
                precision=options.precision,
            )
            check_tile(self._encoder, options.tile_px, options.cells)
        return self._encoder

    def extract(self, job: SlideJob) -> SlideStatus:
        """Extract one slide and write its status."""
        started = time.perf_counter()
        status = SlideStatus(
            job.id, str(job.file), job.case, job.stain, options=self.identity, inputs=_inputs(job, self.options)
        )
        unwanted = _unwanted(job, self.options)
        if unwanted:
            status.status, status.reason = SKIPPED, unwanted
            before = read_status(self.outputs.status(job.id))
            if before is not None and before.status == DONE:
                return status  # its features, made when it was asked for, stay
        else:
            encoder = self.encoder  # outside of what is caught: without an encoder no slide can be done
            try:
                self._extract(job, status, encoder)
                status.status = DONE
            except SlideError as error:
                status.status, status.reason = FAILED, str(error)
                # Features of an earlier state of the file would pass for those of this one.
                self.outputs.features(job.id).unlink(missing_ok=True)
        status.seconds = round(time.perf_counter() - started, 3)
        write_status(self.outputs.status(job.id), status)
        return status

    def _extract(self, job: SlideJob, status: SlideStatus, encoder: PatchEncoder) -> None:
        try:
            self._extract_with(self.backend, job, status, encoder)
        except BackendError as error:
            if self.options.backend != "auto":
                raise
            status.notes = [f"read with OpenSlide, because {error}"]
            if "did not answer" in str(error):
                self.backend = "openslide"  # a thread of fastslide hangs; do not lose more of them
            self._extract_with("openslide", job, status, encoder)

    def _extract_with(self, backend: str, job: SlideJob, status: SlideStatus, encoder: PatchEncoder) -> None:
        options = self.options
        with SlideReader(job.file, backend, timeout=options.read_timeout) as reader:
            status.backend = reader.backend
            scale = find_scale(
                reader.properties, manifest_mpp=job.mpp, flag_mpp=options.slide_mpp, override=options.override_mpp
            )
            status.level0_mpp, status.mpp_source = scale.mpp, scale.source
            status.notes += scale.notes
            level = self._level(reader, scale, status)
            thumbnail, grid, mask = find_grid(reader, scale, job, options)
            tiles = self._tiles(grid, mask, reader, status)
            self._encode(reader, level, grid, tiles, job, status, scale, encoder)
            if options.qc:
                place = (grid, tiles, reader.bounds)
                write_picture(self.outputs.picture(job.id), qc_picture(thumbnail, mask, *place))
                write_geojson(self.outputs.geojson(job.id), job.id, mask, *place)

    def _level(self, reader: SlideReader, scale: Scale, status: SlideStatus) -> int:
        options = self.options
        if scale.mpp > options.mpp * (1 + options.mpp_tolerance):
            raise SlideError(
                f"scanned at {scale.mpp:.4g} mpp ({scale.source}), coarser than the asked {options.mpp:g} by more "
                f"than {options.mpp_tolerance:.0%}: enlarging it would invent detail; use --mpp {scale.mpp:.4g}"
            )
        level = reader.best_level(options.mpp / scale.mpp, options.mpp_tolerance)
        status.level, status.level_mpp = level, scale.mpp * reader.level_downsamples[level]
        return level

    def _tiles(self, grid: Grid, mask: np.ndarray, reader: SlideReader, status: SlideStatus) -> np.ndarray:
        options = self.options
        fraction = tissue_fraction(grid, mask, reader.bounds)
        tiles = select(fraction, options.min_tissue)
        if not len(tiles):
            raise SlideError(
                f"no tile has {options.min_tissue:.0%} of tissue (the best has {fraction.max():.1%}): "
                "lower --min-tissue, or --mpp for a small field"
            )
        status.tissue_tiles = len(tiles)
        tiles = cap(tiles, options.max_tiles)
        status.tiles = len(tiles)
        if status.tiles < status.tissue_tiles:
            status.notes.append(
                f"{status.tiles} of {status.tissue_tiles} tiles with tissue, spread evenly, are kept (--max-tiles)"
            )
        return tiles

    def _encode(
        self,
        reader: SlideReader,
        level: int,
        grid: Grid,
        tiles: np.ndarray,
        job: SlideJob,
        status: SlideStatus,
        scale: Scale,
        encoder: PatchEncoder,
    ) -> None:
        options = self.options
        per_tile = options.cells**2
        size = options.batch_size or (64 if encoder.device.type == "cpu" else 256)
        stream = read_tiles(reader, level, grid, tiles, options.tile_px, _workers(options), options.read_timeout)
        bar = tqdm(total=len(tiles), desc=job.id, unit="tile", disable=None if self.progress else True, leave=False)
        writer = FeatureWriter(self.outputs.features(job.id), len(tiles) * per_tile, encoder.dim, dtype=options.dtype)
        with bar, contextlib.closing(stream), writer:
            for places, images in batches(stream, size):
                writer.append(encode_tiles(encoder, images, options.cells), grid.coords(places, options.cells))
                bar.update(len(places))
            writer.set_attrs(
                {
                    "encoder": encoder.name,
                    "encoder_fingerprint": encoder.fingerprint,
                    "patch_size": grid.step / options.cells,
                    "tile_px": options.tile_px,
                    "cells": options.cells,
                    "mpp": options.mpp,
                    "level0_mpp": scale.mpp,
                    "mpp_source": scale.source,
                    "width": reader.level_dimensions[0][0],
                    "height": reader.level_dimensions[0][1],
                    "level": level,
                    "level_downsample": reader.level_downsamples[level],
                    "backend": reader.backend,
                    "stain": job.stain,
                    "tissue_tiles": status.tissue_tiles,
                    "openslide": openslide.__library_version__,
                }
            )


def find_grid(
    reader: SlideReader, scale: Scale, job: SlideJob, options: ExtractOptions
) -> tuple[np.ndarray, Grid, np.ndarray]:
    """Find the tile grid and the tissue of a slide.

    Returns:
        the thumbnail (h, w, 3) uint8, the grid of tiles, and the tissue mask (h, w) bool of the thumbnail.

    Raises:
        SlideError: damaged, no tissue, or a dark background without the option for it.
    """
    grid = make_grid(reader.bounds, scale.mpp, options.mpp, options.tile_px)
    ratio = max(1.0, grid.step / MASK_PARTS, max(reader.bounds[2:]) / MASK_SIDE)
    thumbnail = read_thumbnail(reader, ratio, _workers(options), options.read_timeout)
    mask = find_tissue(
        thumbnail,
        reader.bounds[2] * scale.mpp / thumbnail.shape[1],
        ink=None if not job.stain else stain_key(job.stain) == "he",
        dark_background=options.dark_background,
    )
    return thumbnail, grid, mask


def _workers(options: ExtractOptions) -> int:
    return options.workers or max(2, usable_cores())


def batches(stream: Iterator[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Join blocks of tiles into batches of `size`; the last may be smaller."""
    places: list[np.ndarray] = []
    images: list[np.ndarray] = []
    count = 0
    for block_places, block_images in stream:
        places.append(block_places)
        images.append(block_images)
        count += len(block_places)
        if count >= size:
            all_places, all_images = np.concatenate(places), np.concatenate(images)
            whole = count - count % size
            for start in range(0, whole, size):
                yield all_places[start : start + size], all_images[start : start + size]
            places, images, count = [all_places[whole:]], [all_images[whole:]], count - whole
    if count:
        yield np.concatenate(places), np.concatenate(images)
