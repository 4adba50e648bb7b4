"""Open images with one limit of pixels, and only formats that Pillow decodes by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import openslide
from PIL import Image

from frugalpath.errors import InputError

MAX_PIXELS = 100_000_000
"""10,000 x 10,000: more than any field of view, less than what exhausts a machine."""
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")
"""Allowed formats, whatever a file is called: for others, such as EPS, Pillow starts an external program."""

# Pillow's own limit is the limit here, so that it also holds where other packages open an image. By default Pillow
# warns at 89 million pixels and refuses at twice that.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
Image.init()  # Pillow would know only a few of the formats until then


OR_DROP = " or drop its row"
"""End of a remedy, for files that a manifest names."""


class ImageError(InputError):
    """An image that cannot be decoded; the message continues a sentence that begins with its path."""


def allow_pixels(pixels: int) -> None:
    """Raise this process's limit of pixels per image; a higher limit stays."""
    Image.MAX_IMAGE_PIXELS = max(pixels, Image.MAX_IMAGE_PIXELS or 0)


def open_image(
    path: str | os.PathLike | BinaryIO, max_pixels: int | None = None, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """Open an image file and check its size; nothing is decoded yet.

    Args:
        max_pixels: stricter limit than that of the process.
        formats: of `FORMATS`, where the format is known: trying the others takes as long as opening it.

    Raises:
        ImageError: no such file, not an image, or too large.
    """
    limit = min(n for n in (max_pixels, Image.MAX_IMAGE_PIXELS) if n is not None)
    try:
        image = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise ImageError(f"is too large to open ({error}); {_REMEDY}") from error
    except Exception as error:  # readers of broken heads raise almost anything
        raise undecodable(error) from error
    if image.width * image.height > limit:
        image.close()
        raise too_large(image.width, image.height, limit)
    return image


def read_image(path: str | os.PathLike, mode: str | None = "RGB", max_pixels: int | None = None) -> Image.Image:
    """Decode an image file, and convert it unless `mode` is None.

    Raises:
        ImageError: as `open_image`, and where the pixels are damaged.
    """
    with open_image(path, max_pixels) as image:
        try:
            image.load()
            return image.copy() if mode is None else image.convert(mode)
        except Exception as error:  # decoders of broken bytes too
            raise undecodable(error) from error


def too_large(width: int, height: int, limit: int) -> ImageError:
    """Message for an image over a limit of pixels."""
    return ImageError(f"has {width} x {height} pixels, more than max_pixels = {limit:,}; {_REMEDY}")


def undecodable(error: Exception) -> ImageError:
    """Message for a file without an intact image."""
    return ImageError(f"cannot be decoded ({error}); replace the file{OR_DROP}")


def slide_format(path: str | os.PathLike) -> str | None:
    """The scanner's format of a TIFF that is a whole slide, else None.

    The first picture in such a file may be its macro image, with the label on it.
    """
    found = openslide.OpenSlide.detect_format(str(Path(path)))
    return None if found in (None, "generic-tiff") else found


def plain_picture(path: str | os.PathLike, data: bytes) -> bool:
    """Whether a file is certainly not a whole slide, by its name and first 132 bytes, without `slide_format`.

    OpenSlide knows slides by TIFF or DICOM heads, by heads that Pillow does not read, or by names of their own: the
    file of a MIRAX slide (.mrxs) is a JPEG.
    """
    named = os.fspath(path).lower().endswith(_PLAIN_NAMES)
    return named and not data.startswith(_TIFF_HEADS) and data[128:132] != b"DICM"


_PLAIN_NAMES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_REMEDY = "give a whole slide under `slides`, or raise max_pixels"
