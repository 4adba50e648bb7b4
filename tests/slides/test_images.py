"""Which files OpenSlide need not be asked about."""

import io

import numpy as np
import openslide
import pytest
from PIL import Image

from frugalpath.slides.images import FORMATS, plain_picture, slide_format

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
NAMES = ["a.png", "a.JPG", "a.jpeg", "a.bmp", "a.webp", "a.gif", "a.tif", "a.mrxs", "a.svs", "a.vms", "a.dcm", "a"]


def encoded(format):
    buffer = io.BytesIO()
    PICTURE.save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_called_plain_is_no_slide(tmp_path, format):
    data = encoded(format)
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(data)
        if plain_picture(path, data):
            assert openslide.OpenSlide.detect_format(str(path)) is None
    assert plain_picture("a.png", data) == (format != "TIFF"), "most pictures are not asked about"


@pytest.mark.parametrize("head", [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"])
def test_a_tiff_under_any_name_is_asked_about(head):
    assert not plain_picture("slide.png", head + bytes(200))


def test_a_mirax_slide_is_a_jpeg(tmp_path):
    data = encoded("JPEG")
    (tmp_path / "a.mrxs").write_bytes(data)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/Slidedat.ini").touch()
    assert slide_format(tmp_path / "a.mrxs") == "mirax"
    assert not plain_picture(tmp_path / "a.mrxs", data)


def test_a_dicom_file_may_begin_like_a_picture():
    assert not plain_picture("a.png", encoded("PNG")[:128].ljust(128, b"\0") + b"DICM")
