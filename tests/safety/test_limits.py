"""A small file cannot make a large allocation, and no file reaches beyond itself or its folder."""

from __future__ import annotations

import io
import os
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from frugalpath.envs.boxes import boxes_from_mask
from frugalpath.envs.manifest import build
from frugalpath.envs.new_cases import read_new_cases
from frugalpath.errors import InputError
from frugalpath.parsing import MAX_YAML, read_yaml
from frugalpath.slides import images
from frugalpath.slides.images import ImageError, allow_pixels, open_image, read_image
from frugalpath.slides.jobs import find_jobs
from frugalpath.slides.store import count_features, read_features
from frugalpath.slides.trial import ProcessPool, _look, try_features


@pytest.fixture(autouse=True)
def usual_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", images.MAX_PIXELS)


def png(path: Path, width: int, height: int) -> Path:
    """A PNG that states a size and holds no pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


# Images.


@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_bomb_is_not_decoded(tmp_path, side):
    with pytest.raises(ImageError, match="raise max_pixels"):
        read_image(png(tmp_path / "bomb.png", side, side))


def test_one_limit_for_all(tmp_path):
    path = png(tmp_path / "wide.png", 20_000, 6_000)
    with pytest.raises(ImageError, match=r"more than max_pixels = 100,000,000"):
        open_image(path)
    allow_pixels(150_000_000)
    assert open_image(path).size == (20_000, 6_000)
    allow_pixels(1000)
    assert open_image(path).size == (20_000, 6_000), "a limit is only raised"
    with pytest.raises(ImageError, match="max_pixels = 1,000"):
        open_image(path, max_pixels=1000)


def test_a_manifest_raises_the_limit(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "new.jsonl").write_text('{"images": "0.png", "prompt": "q", "task": "open"}')
    (tmp_path / "cases.jsonl").write_text(
        '{"id": 1, "patient": 1, "images": "0.png", "prompt": "q", "task": "open", "answer": "a"}'
    )
    with pytest.raises(InputError, match="max_pixels = 100"):
        read_new_cases(str(tmp_path / "new.jsonl"), {"max_pixels": 100})
    build(path=str(tmp_path / "cases.jsonl"), max_pixels=200_000_000)
    assert Image.MAX_IMAGE_PIXELS == 200_000_000


def test_no_other_program_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(tmp_path / "x.png")


def test_text_that_unfolds_in_an_image(tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "a" * 2_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=note)
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_image(tmp_path / "x.png")


def test_a_mask_with_a_large_id(tmp_path):
    ids = np.zeros((20, 20), np.int32)
    ids[2:5, 2:5], ids[10:15, 10:15] = 2**31 - 1, 7
    Image.fromarray(ids).save(tmp_path / "m.tif")
    assert boxes_from_mask(str(tmp_path / "m.tif"), (20, 20)) == [[100, 100, 250, 250], [500, 500, 750, 750]]


# Feature files.


@pytest.fixture
def stored(tmp_path):
    """Writes a file with features (3, 2) and coords (3, 2), after `change` of it."""

    def make(change) -> Path:
        path = tmp_path / "x.h5"
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = np.ones((3, 2), "f4"), np.arange(6).reshape(3, 2)
            change(file)
        return path

    return make


def refused(path: Path, message: str) -> None:
    for read in (read_features, count_features):
        with pytest.raises(InputError, match=rf"x\.h5: .*{message}"):
            read(path)


@pytest.mark.parametrize("packed", [None, "gzip"])
@pytest.mark.parametrize(("rows", "message"), [(10**12, "more than"), (10**8, "holds only a part")])
def test_rows_that_are_not_there(stored, packed, rows, message):
    def change(file: h5py.File) -> None:
        del file["features"], file["coords"]
        file.create_dataset("features", (rows, 8), "f4", chunks=(1024, 8), compression=packed)
        file.create_dataset("coords", (rows, 2), "i8", chunks=(1024, 2), compression=packed)

    refused(stored(change), message)


def test_compressed_features_are_read(stored):
    def change(file: h5py.File) -> None:
        del file["features"], file["coords"]
        file.create_dataset("features", data=np.zeros((50_000, 64), "f4"), compression="gzip", compression_opts=9)
        file.create_dataset("coords", data=np.zeros((50_000, 2), "i8"), compression="gzip")

    assert len(read_features(stored(change))) == 50_000


def test_other_files_are_not_read(stored, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["features"] = np.full((3, 2), 42.0, "f4")

    def link(file: h5py.File) -> None:
        del file["features"]
        file["features"] = h5py.ExternalLink(str(secret), "/features")

    def soft(file: h5py.File) -> None:
        del file["features"]
        file["far"] = h5py.ExternalLink(str(secret), "/")
        file["features"] = h5py.SoftLink("/far/features")

    def virtual(file: h5py.File) -> None:
        del file["features"]
        layout = h5py.VirtualLayout((3, 2), "f4")
        layout[:] = h5py.VirtualSource(str(secret), "features", (3, 2))
        file.create_virtual_dataset("features", layout)

    def outside(file: h5py.File) -> None:
        del file["features"]
        file.create_dataset("features", (3, 2), "f4", external=[(str(secret), 0, 24)])

    for change, message in ((link, "link"), (soft, "link"), (virtual, "other files"), (outside, "other files")):
        refused(stored(change), message)


@pytest.mark.parametrize("value", ["wide", np.inf, -1.0, np.zeros(3)])
def test_attributes_that_are_no_size(stored, value):
    path = stored(lambda file: file.attrs.update(patch_size=value))
    with pytest.raises(InputError, match=r"x\.h5: .*extract this slide again"):
        read_features(path)


def test_places_beyond_any_slide(stored):
    def change(file: h5py.File) -> None:
        del file["coords"]
        file["coords"] = np.full((3, 2), np.nan)

    with pytest.raises(InputError, match="invalid positions"):
        read_features(stored(change))


# Text.


def test_a_large_yaml_file_is_not_read(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: " + b"b" * MAX_YAML)
    with pytest.raises(InputError, match=r"x\.yaml: larger than"):
        read_yaml(tmp_path / "x.yaml")


def test_a_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr("frugalpath.envs.rows.MAX_LINE", 1000)
    (tmp_path / "x.jsonl").write_text("{}\n" + '{"a": "' + "b" * 2000)
    with pytest.raises(InputError, match=r"x\.jsonl:2: a line of more than 1,000 bytes"):
        build(path=str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(("limit", "name"), [("MAX_TEXT", "x.csv"), ("MAX_TEXT", "x.json"), ("MAX_ROWS", "x.parquet")])
def test_files_that_are_too_large(tmp_path, monkeypatch, limit, name):
    import pandas

    monkeypatch.setattr(f"frugalpath.envs.rows.{limit}", 1)
    table = pandas.DataFrame({"file": ["0.png"] * 5})
    buffer = io.BytesIO()
    {"x.csv": table.to_csv, "x.json": table.to_json, "x.parquet": table.to_parquet}[name](buffer)
    (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match=rf"{name}: .*than"):
        build(path=str(tmp_path / name))


# Folders.


@pytest.mark.parametrize("how", ["absolute", "up", "link"])
def test_slides_outside_of_a_manifest(tmp_path, how):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "far.svs").write_bytes(b"x")
    (home / "link.svs").symlink_to(tmp_path / "far.svs")
    name = {"absolute": str(tmp_path / "far.svs"), "up": "../far.svs", "link": "link.svs"}[how]
    (home / "m.csv").write_text(f"file,id\n{name},a\n")
    with pytest.raises(InputError, match=r"m\.csv, row 1: .* leaves the manifest's folder; set --allow_outside"):
        find_jobs(home / "m.csv")
    assert [job.id for job in find_jobs(home / "m.csv", allow_outside=True)] == ["a"]


def test_a_ring_of_links(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "x.jsonl").write_text(
        '{"id": 1, "patient": 1, "task": "open", "prompt": "q", "answer": "a", "images": "a.png"}'
    )
    with pytest.raises(InputError, match=r"x\.jsonl:1: "):
        build(path=str(tmp_path / "x.jsonl"))
    (tmp_path / "m.csv").write_text("file\na.png\n.\n")
    with pytest.raises(InputError, match="row 2: file is empty"):
        find_jobs(tmp_path / "m.csv")


def test_a_file_that_the_library_reads_for_ever(stored):
    path = stored(lambda file: file.attrs.update(encoder="a", note="b" * 50))
    data = path.read_bytes()
    heap = data.index(b"GCOL")
    assert read_features(path).attrs["encoder"] == "a"
    path.write_bytes(data[: heap + 16] + bytes(16) + data[heap + 32 :])  # the first text takes no space
    refused(path, "heap of texts is damaged")


def test_a_file_that_ends_the_process(stored, monkeypatch):
    """Attributes of damaged files crash the library; a first reading elsewhere tells them from the others."""
    good = str(stored(lambda file: file.attrs.update(patch_size=32)))
    looks = {good: _look, "crash": _crash, "slow": _sleep}
    schedule = ProcessPool.schedule
    monkeypatch.setattr(
        ProcessPool, "schedule", lambda pool, _, args, timeout: schedule(pool, looks[args[0]], args, timeout=timeout)
    )
    found = list(try_features([good, "crash", "slow", good], timeout=20.0))
    assert found[0] == found[3] == (3, 2, True)
    assert "crashes the library" in found[1] and "not within 20 s" in found[2]


def _crash(path: str) -> None:
    os.abort()


def _sleep(path: str) -> None:
    time.sleep(1000)
