"""Read any region of a slide at any level and size, in bounded memory, with OpenSlide or fastslide.

Only the pyramid is read. Label and macro images, which may show a patient's name, are never opened.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import torch
from torch.nn import functional

from frugalpath.errors import InputError
from frugalpath.slides.scale import SlideError

BACKENDS = ("auto", "openslide", "fastslide")
# The most native pixels that one read holds (64 MB as RGBA). Larger boxes are put together from parts.
MAX_READ = 2**24
# A native tile is decoded whole by both backends; one of more pixels than this is refused.
MAX_NATIVE_TILE = 2**28
_CACHE_BYTES = 64 * 2**20


class BackendError(SlideError):
    """The fast backend failed on a slide that OpenSlide may still read."""


class SlideReader:
    """One open slide. Threads may share it.

    Attributes:
        path: the file.
        backend: `openslide` or `fastslide`: what the pixels are read with. Metadata always come from OpenSlide.
        level_dimensions: (width, height) of each level, px.
        level_downsamples: level-0 pixels per pixel of each level.
        properties: OpenSlide's properties.
        background: RGB of areas that were not scanned.
        bounds: x, y, width, height of the scanned area, in level-0 px.
    """

    def __init__(self, path: str | os.PathLike, backend: str = "openslide", *, timeout: float = 120.0):
        """Open a slide.

        Args:
            path: anything OpenSlide reads.
            backend: `auto` takes fastslide where it is installed and agrees with OpenSlide on this file.
            timeout: seconds that fastslide may take for its first answer.

        Raises:
            SlideError: the file cannot be opened.
            InputError: an unknown backend, or fastslide is asked for and not installed.
        """
        if backend not in BACKENDS:
            raise InputError(f"backend {backend}: must be one of {', '.join(BACKENDS)}")
        self.path = Path(path)
        self._slide = _open(self.path)
        self.properties = dict(self._slide.properties)
        self.level_dimensions: tuple[tuple[int, int], ...] = self._slide.level_dimensions
        self.level_downsamples: tuple[float, ...] = self._slide.level_downsamples
        self.background = _background(self.properties)
        self.bounds = self._bounds()
        self._check_native_tiles()
        self._stuck = False
        self._fast = None
        if backend != "openslide":
            self._fast = self._open_fast(required=backend == "fastslide", timeout=timeout)
        self.backend = "openslide" if self._fast is None else "fastslide"

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless a read hangs in it."""
        if self._stuck:
            return
        self._slide.close()
        if self._fast is not None:
            self._fast.close()

    def give_up(self) -> None:
        """Never close the file, since a thread hangs in a read."""
        self._stuck = True

    def best_level(self, downsample: float, tolerance: float = 0.0) -> int:
        """Coarsest level that exceeds `downsample` by at most the fraction `tolerance`.

        A rounding of 1 per mille in the level's downsample is always allowed. Level 0 where none is fine enough.
        """
        limit = downsample * max(1 + tolerance, 1.001)
        return max((i for i, d in enumerate(self.level_downsamples) if d <= limit), default=0)

    def read(self, level: int, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
        """Read a box of a level, resampled to a size, in bounded memory.

        Args:
            level: which level.
            box: left, top, right, bottom in pixels of that level. What lies outside of the slide is filled with the
                background.
            size: width and height of the result, px.

        Returns:
            uint8 (height, width, 3).

        Raises:
            SlideError: the file is damaged there. BackendError when it was fastslide that failed.
        """
        left, top, right, bottom = box
        width, height = size
        if (right - left) * (bottom - top) <= MAX_READ or max(size) == 1:
            return resample(self.native(level, left, top, right - left, bottom - top), size)
        if width >= height:
            middle = width // 2
            cut = left + round((right - left) * middle / width)
            first = self.read(level, (left, top, cut, bottom), (middle, height))
            second = self.read(level, (cut, top, right, bottom), (width - middle, height))
            return np.concatenate([first, second], axis=1)
        middle = height // 2
        cut = top + round((bottom - top) * middle / height)
        first = self.read(level, (left, top, right, cut), (width, middle))
        second = self.read(level, (left, cut, right, bottom), (width, height - middle))
        return np.concatenate([first, second], axis=0)

    def native(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read pixels of a level without resampling; areas outside it are background.

        Returns:
            uint8 (height, width, 3 or 4); a fourth channel is 255 throughout and spares a copy here: drop it.

        Raises:
            SlideError: as `read`.
        """
        level_width, level_height = self.level_dimensions[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, level_width), min(y + height, level_height)
        whole = (x0, y0, x1, y1) == (x, y, x + width, y + height)
        read = self._native_openslide if self._fast is None else self._native_fast
        pixels = read(level, x0, y0, x1 - x0, y1 - y0) if x1 > x0 and y1 > y0 else None
        if whole and pixels is not None:
            return pixels
        canvas = np.empty((height, width, 3), np.uint8)
        canvas[:] = self.background
        if pixels is not None:
            canvas[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[..., :3]
        return canvas

    def _native_openslide(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        down = self.level_downsamples[level]
        try:
            pixels = np.asarray(self._slide.read_region((round(x * down), round(y * down)), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise SlideError(f"damaged at level {level}, x {x}, y {y}: {error}") from error
        alpha = pixels[..., 3:]
        if alpha.min() == 255:
            return pixels
        # Transparent: nothing was scanned there. Dropping the channel would make it black.
        covered = alpha.astype(np.uint16)
        background = np.array(self.background, np.uint16)
        return ((pixels[..., :3] * covered + background * (255 - covered)) // 255).astype(np.uint8)

    def _native_fast(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert self._fast is not None
        try:
            # Unlike OpenSlide's, these coordinates are pixels of the level.
            pixels = self._fast.read_region((x, y), level, (width, height)).numpy()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BackendError(f"fastslide failed at level {level}, x {x}, y {y}: {reason}") from error
        return np.ascontiguousarray(pixels)

    def _open_fast(self, *, required: bool, timeout: float) -> Any:
        """Open a fastslide handle that agrees with OpenSlide, or return None; raise BackendError if it is required."""
        fastslide = _fastslide()
        if fastslide is None:
            if required:
                raise InputError("backend fastslide: not installed: pip install 'frugalpath[fast]', or --backend auto")
            return None
        try:
            slide = within(timeout, lambda: self._agreeing(fastslide.FastSlide.from_file_path(str(self.path))))
        except (RuntimeError, TimeoutError) as error:
            slide, problem = None, str(error).splitlines()[0]
        else:
            problem = "its levels or its pixels differ from OpenSlide's"
        if slide is None and required:
            raise BackendError(f"fastslide cannot be used for this file: {problem}; use --backend auto")
        return slide

    def _agreeing(self, slide: Any) -> Any:
        """Return `slide` if it agrees with OpenSlide in the middle of level 0, else None."""
        same = tuple(slide.level_dimensions) == self.level_dimensions
        if not same or slide.dtype != "uint8" or slide.num_channels != 3 or "openslide.bounds-x" in self.properties:
            return None
        slide.set_cache(_CACHE_BYTES)
        width, height = self.level_dimensions[0]
        side_x, side_y = min(256, width), min(256, height)
        x, y = (width - side_x) // 2, (height - side_y) // 2
        theirs = np.asarray(slide.read_region((x, y), 0, (side_x, side_y)).numpy())
        ours = self._native_openslide(0, x, y, side_x, side_y)[..., :3]
        # Decoders differ in chroma interpolation: by up to 1.5 grey levels in the mean on real slides.
        agree = theirs.shape == ours.shape and np.abs(theirs.astype(np.int16) - ours).mean() < 4
        return slide if agree else None

    def _bounds(self) -> tuple[int, int, int, int]:
        keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
        if not all(key in self.properties for key in keys):
            return (0, 0, *self.level_dimensions[0])
        x, y, width, height = (int(self.properties[key]) for key in keys)
        return x, y, width, height

    def _check_native_tiles(self) -> None:
        for level in range(len(self.level_dimensions)):
            keys = [f"openslide.level[{level}].tile-{side}" for side in ("width", "height")]
            sides = [int(self.properties[key]) for key in keys if key in self.properties]
            if len(sides) == 2 and sides[0] * sides[1] > MAX_NATIVE_TILE:
                self._slide.close()
                raise SlideError(
                    f"level {level} is stored in tiles of {sides[0]} x {sides[1]} px, each of which must be decoded "
                    "whole; write the slide anew with small tiles, e.g. vips tiffsave --tile --pyramid"
                )


def resample(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3 or 4) -> uint8 (height, width, 3), by a triangle filter as wide as a pixel of the result.

    The result is that of PIL's BILINEAR to one grey level, sooner.
    """
    width, height = size
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels[..., :3])
    # A copy, because torch takes no read-only memory, which PIL's is.
    image = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]
    result = functional.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(result[0].permute(1, 2, 0).numpy()[..., :3])


def within(seconds: float, call: Any) -> Any:
    """Return the result of `call()`, or raise its errors, or TimeoutError after some seconds.

    The thread of a call that never returns is given up; it does not keep the process from ending.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome["value"]


def _open(path: Path) -> openslide.OpenSlide:
    if not path.is_file():
        raise SlideError("no such file")
    try:
        slide = openslide.OpenSlide(str(path))
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"not a slide that OpenSlide reads ({error}); a TIFF must be tiled: vips tiffsave --tile --pyramid"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"OpenSlide cannot open it: {error}") from error
    slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
    return slide


@functools.cache
def _fastslide() -> Any:
    try:
        import fastslide
    except ImportError:
        return None
    return fastslide


def _background(properties: dict[str, str]) -> tuple[int, int, int]:
    text = properties.get("openslide.background-color", "FFFFFF")
    red, green, blue = bytes.fromhex(text)
    return red, green, blue
