"""What is said of an image without opening it is what Pillow says of it."""

import io

import numpy as np
import pytest
from PIL import Image

from frugalpath.slides.images import open_image
from frugalpath.slides.plain import plain_size


def saved(mode, format, **options):
    shape = (19, 24) if mode == "L" else (19, 24, len(mode))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, format, **options)
    return file.getvalue()


PLAIN = {
    "png": saved("RGB", "PNG"),
    "png gray": saved("L", "PNG"),
    "png alpha": saved("RGBA", "PNG"),
    "jpeg": saved("RGB", "JPEG"),
    "jpeg gray": saved("L", "JPEG"),
    "jpeg progressive": saved("RGB", "JPEG", progressive=True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_images(name):
    assert plain_size(PLAIN[name], 19 * 24) == (24, 19)
    assert plain_size(PLAIN[name], 19 * 24 - 1) is None


@pytest.mark.parametrize("name", PLAIN)
def test_of_damaged_images_only_those_that_pillow_decodes_pass(name):
    rng = np.random.default_rng(1)
    data = PLAIN[name]
    for n in range(1500):
        changed = bytearray(data)
        for at in rng.integers(0, min(len(data), 700) if n % 2 else len(data), rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        changed = bytes(changed[: rng.integers(len(data))] if n % 5 == 0 else changed)
        if size := plain_size(changed, 10**6):
            with open_image(io.BytesIO(changed)) as image:
                assert image.size == size
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", saved("RGB", "BMP"), saved("RGB", "GIF")])
def test_nothing_is_said_of_others(data):
    assert plain_size(data, 10**6) is None
