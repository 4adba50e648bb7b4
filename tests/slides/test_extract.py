"""Whole extractions: what is written, what is refused and why, resuming, the command line, several processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import frugalpath.slides.encoder
import frugalpath.slides.extraction
from frugalpath.errors import InputError
from frugalpath.slides.extract import main, parse
from frugalpath.slides.extraction import extract_slides
from frugalpath.slides.jobs import SlideJob
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.reader import BackendError
from frugalpath.slides.store import read_features

ROOT = Path(__file__).resolve().parents[2]


def options(**keys) -> ExtractOptions:
    return ExtractOptions(**{"tile_px": 64, "backend": "openslide", **keys})


@pytest.fixture
def extract(tmp_path, encoder):
    """Extract slides into the test's folder with a small encoder; the status of each."""

    def run(*jobs, out="out", **keys):
        return extract_slides(jobs, tmp_path / out, options(**keys), encoder=encoder, progress=False)

    return run


def test_what_is_written(extract, make_slide, tmp_path):
    (status,) = extract(make_slide("s.tif", mpp=1.0))
    assert (status.status, status.level0_mpp, status.mpp_source, status.level) == ("done", 1.0, "openslide.mpp-x", 1)
    found = read_features(tmp_path / "out/features/s.h5")
    assert len(found) == status.tiles == status.tissue_tiles > 20
    attrs = found.attrs
    assert (attrs["mpp"], attrs["level0_mpp"], attrs["patch_size"], attrs["tile_px"]) == (2.0, 1.0, 128.0, 64)
    assert (attrs["encoder"], attrs["encoder_fingerprint"]) == ("mean-colour", "m@1")
    assert (attrs["width"], attrs["height"]) == (1300, 1000)
    # Tiles lie on the tissue: an ellipse in the middle, pink (red over green).
    assert np.all(found.coords % 128 == 0)
    inner = found.features[np.linalg.norm(found.coords + 64 - [650, 500], axis=1) < 150]
    assert np.all(inner[:, 0] > inner[:, 1] + 0.15)
    stored = json.loads((tmp_path / "out/status/s.json").read_text())
    assert stored["status"] == "done" and stored["tiles"] == status.tiles
    assert (tmp_path / "out/qc/s.jpg").exists() and (tmp_path / "out/geojson/s.geojson").exists()
    assert not list(tmp_path.glob("out/**/.*"))  # no temporary file is left


@pytest.mark.slow
def test_a_level_within_the_tolerance_is_resampled(extract, make_slide):
    (status,) = extract(make_slide(mpp=2.02, downs=(1, 2)))
    assert (status.status, status.level) == ("done", 0)
    (status,) = extract(make_slide("b.tif", mpp=1.01, downs=(1, 2, 4)))
    assert status.level == 1 and status.level_mpp == pytest.approx(2.02)


def test_a_coarser_slide_is_refused(extract, make_slide):
    (status,) = extract(make_slide(mpp=4.03))
    assert status.status == "failed"
    assert "scanned at 4.03 mpp" in status.reason and "--mpp 4.03" in status.reason


def test_no_scale_no_tiles(extract, make_slide, tmp_path):
    path = make_slide(mpp=None)
    (status,) = extract(path)
    assert status.status == "failed" and "unknown scale" in status.reason
    assert not (tmp_path / "out/features").exists()
    (status,) = extract(path, slide_mpp=1.0)  # the setting changed, so it is tried again
    assert (status.status, status.mpp_source) == ("done", "--slide-mpp")
    (status,) = extract(SlideJob(path, "other", mpp=1.0), slide_mpp=0.5)
    assert (status.level0_mpp, status.mpp_source) == (1.0, "the manifest's mpp")


def test_72_dpi_is_no_scale(extract, make_slide):
    (status,) = extract(make_slide(mpp=25400 / 72, unit="INCH"))
    assert "openslide.mpp-x = 352.7" in status.reason and "outside 0.05 to 20" in status.reason


@pytest.mark.slow
def test_bad_slides_do_not_stop_the_others(extract, make_slide, tmp_path, corrupt_tile):
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/broken.svs").write_bytes(b"II*\0 and nothing else")
    blank = np.full((600, 600, 3), 243, np.uint8)
    dark = np.zeros((600, 600, 3), np.uint8)
    dark[200:400, 200:400, 1] = 150
    statuses = extract(
        tmp_path / "slides/broken.svs",
        tmp_path / "slides/absent.svs",
        make_slide("blank.tif", image=blank),
        make_slide("dark.tif", image=dark),
        corrupt_tile(make_slide("damaged.tif"), 4, page=1),
        make_slide("good.tif"),
    )
    reasons = {status.id: status.reason for status in statuses}
    assert [status.status for status in statuses] == ["failed"] * 5 + ["done"]
    assert "not a slide that OpenSlide reads" in reasons["broken"]
    assert reasons["absent"] == "no such file"
    assert "no tissue found" in reasons["blank"]
    assert "dark background" in reasons["dark"]
    assert "damaged at level" in reasons["damaged"]
    assert [file.name for file in (tmp_path / "out/features").iterdir()] == ["good.h5"]
    (asked,) = extract(tmp_path / "slides/dark.tif", out="dark", dark_background=True)
    assert asked.status == "done"


@pytest.mark.slow
def test_special_stains_only_when_asked(extract, make_slide):
    path = make_slide()
    jobs = [SlideJob(path, "he", stain="HE"), SlideJob(path, "ihc", stain="CK7"), SlideJob(path, "unknown")]
    he, ihc, unknown = extract(*jobs)
    assert (he.status, ihc.status, unknown.status) == ("done", "skipped", "done")
    assert "stain CK7 is not selected" in ihc.reason and "--stains any" in ihc.reason
    he, ihc, unknown = extract(*jobs, stains=["H&E", "ck7"])
    assert ihc.status == "done" and he.again and unknown.again and not ihc.again
    assert [status.status for status in extract(*jobs, out="any", stains=["any"])] == ["done"] * 3
    # Asked for before and not now: skipped, but what was made stays.
    assert extract(*jobs)[1].status == "skipped"
    assert extract(*jobs, stains=["any"])[1].again


def test_the_cap(extract, make_slide, tmp_path):
    (status,) = extract(make_slide(), max_tiles=7)
    assert status.tiles == 7 < status.tissue_tiles
    assert f"7 of {status.tissue_tiles} tiles" in status.notes[0]
    coords = read_features(tmp_path / "out/features/slide.h5").coords
    assert len(coords) == 7 and np.ptp(coords[:, 1]) > 500  # spread, not the first seven


def test_cells(extract, make_slide, tmp_path):
    path = make_slide()
    (pooled,) = extract(path, out="pooled")
    (status,) = extract(path, out="cells", cells=2)
    one = read_features(tmp_path / "pooled/features/slide.h5")
    four = read_features(tmp_path / "cells/features/slide.h5")
    assert len(four) == 4 * len(one) == 4 * status.tiles == 4 * pooled.tiles
    assert four.attrs["patch_size"] == 64 and four.attrs["cells"] == 2
    np.testing.assert_array_equal(four.coords[::4], one.coords)
    np.testing.assert_allclose(four.features.reshape(-1, 4, 3).mean(1), one.features, atol=1e-5)


def test_half_precision(extract, make_slide, tmp_path):
    extract(make_slide(), dtype="float16")
    import h5py

    with h5py.File(tmp_path / "out/features/slide.h5") as file:
        assert file["features"].dtype == np.float16


def test_a_second_run_does_nothing(extract, make_slide, tmp_path, monkeypatch):
    jobs = [make_slide("a.tif"), make_slide("b.tif", mpp=None)]
    extract(*jobs)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/**/*") if file.is_file()}
    monkeypatch.setattr(frugalpath.slides.extraction, "SlideReader", None)  # nothing may be opened
    statuses = extract_slides(jobs, tmp_path / "out", options(), progress=False)  # nor the encoder loaded
    assert all(status.again for status in statuses)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("out/**/*") if file.is_file()}


@pytest.mark.slow
def test_what_changed_is_done_again(extract, make_slide):
    path = make_slide("a.tif", mpp=1.0)
    extract(path)
    make_slide("a.tif", height=900, mpp=1.0)
    (status,) = extract(path)
    assert status.status == "done" and not status.again


def test_retry(extract, make_slide):
    path = make_slide(mpp=None)
    extract(path)
    assert extract(path)[0].again
    assert not extract(path, retry=True)[0].again


def test_other_options_need_another_folder(extract, make_slide):
    path = make_slide()
    extract(path)
    with pytest.raises(InputError, match=r"mpp 2\.0 -> 3\.0.*--overwrite"):
        extract(path, mpp=3.0)
    (status,) = extract(path, mpp=3.0, overwrite=True)
    assert status.status == "done" and not status.again


def test_half_a_status_file_counts_as_none(extract, make_slide, tmp_path):
    path = make_slide()
    extract(path)
    (tmp_path / "out/status/slide.json").write_text('{"id": "sl')
    (status,) = extract(path)
    assert status.status == "done" and not status.again


@pytest.mark.slow
def test_shares_are_disjoint_and_complete(make_slide, tmp_path, encoder):
    jobs = [make_slide(f"{i}.tif", height=600, width=600) for i in range(5)]
    shares = [
        extract_slides(jobs, tmp_path / "out", options(), encoder=encoder, rank=rank, world=2, progress=False)
        for rank in (0, 1)
    ]
    assert {len(share) for share in shares} == {2, 3}
    assert sorted(status.id for share in shares for status in share) == list("01234")


def test_fastslide_that_fails_is_replaced(extract, make_slide, monkeypatch):
    pytest.importorskip("fastslide")
    path = make_slide()

    def fail(self, *_):
        raise BackendError("fastslide did not answer for 1 s: the file may be damaged")

    monkeypatch.setattr(frugalpath.slides.reader.SlideReader, "_native_fast", fail)
    (status,) = extract(path, backend="auto")
    assert (status.status, status.backend) == ("done", "openslide")
    assert "read with OpenSlide, because fastslide did not answer" in status.notes[0]
    (status,) = extract(path, out="strict", backend="fastslide")
    assert status.status == "failed"


@pytest.mark.slow
def test_a_damaged_slide_does_not_hang_fastslide(make_slide, corrupt_tile, tmp_path):
    """fastslide 0.8 never returns from a tile that is no JPEG: OpenSlide takes over and tells what is wrong.

    In a process of its own, whose memory fastslide may spoil.
    """
    pytest.importorskip("fastslide")
    folder = corrupt_tile(make_slide("damaged.tif"), 4, page=1).parent
    make_slide("good.tif")
    options = ["--backend", "auto", "--read_timeout", "1", "--tile_px", "64", "--min_tissue", "0"]
    command = [
        sys.executable,
        "-m",
        "frugalpath.slides.extract",
        "--slides",
        str(folder),
        "--out",
        str(tmp_path / "o"),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    statuses = {n: json.loads((tmp_path / f"o/status/{n}.json").read_text()) for n in ("damaged", "good")}
    assert statuses["damaged"]["status"] == "failed" and "damaged at level 1" in statuses["damaged"]["reason"]
    assert "did not answer" in statuses["damaged"]["notes"][0]
    assert (statuses["good"]["status"], statuses["good"]["backend"]) == ("done", "openslide"), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mpp": 0.0}, "--mpp"),
        ({"slide_mpp": 352.8}, "--slide-mpp 352.8"),
        ({"min_tissue": 2.0}, "--min-tissue"),
        ({"workers": 0}, "--workers"),
        ({"dtype": "int8"}, "--dtype"),
        ({"backend": "vips"}, "--backend"),
        ({"stains": []}, "--stains"),
        ({"tile_px": 100}, "multiples of 32"),
        ({"cells": 3}, "--cells 3"),
    ],
)
def test_bad_options(extract, make_slide, keys, message):
    with pytest.raises(InputError, match=message):
        extract(make_slide(), **keys)


# The command line.


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["extract.py", *arguments])
    try:
        main()
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture
def small_encoder(monkeypatch, encoder):
    monkeypatch.setattr(frugalpath.slides.extraction, "load_encoder", lambda *_, **__: encoder)


@pytest.mark.usefixtures("small_encoder")
def test_command_line(make_slide, tmp_path, monkeypatch, capsys):
    make_slide("a.tif")
    make_slide("b.tif", mpp=None)
    folder, out = str(tmp_path / "slides"), str(tmp_path / "out")
    arguments = ("--slides", folder, "--out", out, "--tile-px", "64", "--device", "cpu")
    assert run_main(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert "unknown scale" in text and "1 done, 1 failed, 0 skipped" in text
    lines = [json.loads(line) for line in (tmp_path / "out/extract.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"]) for line in lines] == [("a", "done"), ("b", "failed")]
    assert run_main(monkeypatch, *arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.usefixtures("small_encoder")
def test_exit_status_when_nothing_could_be_extracted(make_slide, tmp_path, monkeypatch, capsys):
    path = make_slide(mpp=None)
    assert run_main(monkeypatch, "--slides", str(path), "--out", str(tmp_path / "out"), "--device", "cpu") == 2
    message = capsys.readouterr().err
    assert "no slide could be extracted" in message and "--slide-mpp" in message
    assert (tmp_path / "out/extract.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slides", "x"], "--out: missing"),
        (["--slides", "absent", "--out", "o"], "no such file or folder"),
        (["--slides", "absent", "--out", "o", "--mpp", "0"], "--mpp 0.0"),
        (["--slides", "absent", "--out", "o", "--no-such-flag", "1"], "no-such-flag"),
        (["--slides", "absent", "--out", "o", "--mpp", "two"], "mpp"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, message):
    assert run_main(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_yaml(tmp_path, monkeypatch):
    config = tmp_path / "e.yaml"
    config.write_text("slides: here\nout: there\nstains: [H&E, IHC]\nslide_mpp: 0.25\ncells: 7\n")
    found = parse(["--config", str(config), "--cells", "1"])
    assert (found.slides, found.stains, found.slide_mpp, found.cells) == ("here", ["H&E", "IHC"], 0.25, 1)
    config.write_text("slides: here\nout: there\nmmp: 2\n")
    assert run_main(monkeypatch, "--config", str(config)) == 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def command(*arguments: str) -> dict:
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {"args": list(arguments), "cwd": ROOT, "env": environment, "text": True}


@pytest.mark.slow
def test_a_killed_run_resumes(make_slide, tmp_path):
    jobs = [make_slide(f"{i}.tif", height=800, width=800) for i in range(6)]
    arguments = ["--slides", str(tmp_path / "slides"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    process = subprocess.Popen(
        **command(sys.executable, "-m", "frugalpath.slides.extract", *arguments, "--tile_px", "64"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = tmp_path / "out/status"
    deadline = time.monotonic() + 120
    while not (status.is_dir() and any(status.glob("*.json"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {file.stem: file.stat().st_mtime_ns for file in status.glob("*.json")}
    assert 0 < len(finished) < 6
    for name in finished:  # what has a status is whole
        assert len(read_features(tmp_path / f"out/features/{name}.h5")) > 0
    statuses = extract_slides(jobs, tmp_path / "out", ExtractOptions(tile_px=64), progress=False)
    assert [status.status for status in statuses] == ["done"] * 6
    assert {status.id for status in statuses if status.again} == set(finished)
    assert not list(tmp_path.glob("out/**/.*.tmp"))


WATCHED = """
import sys
sys.path.insert(0, {root!r})
from frugalpath.slides import extract
own = extract.extract_slides
def watched(*arguments, **options):
    found = own(*arguments, **options)
    print("SHARE", options["rank"], options["world"], len(found), flush=True)
    return found
extract.extract_slides = watched
extract.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_two_processes(make_slide, tmp_path, device):
    """By torchrun and by accelerate launch: each has a share, also on a machine without an accelerator."""
    for i in range(3):
        make_slide(f"{i}.tif", height=600, width=600)
    (tmp_path / "slides/broken.svs").write_bytes(b"nothing")
    (tmp_path / "watched.py").write_text(WATCHED.format(root=str(ROOT)))
    arguments = ["--slides", str(tmp_path / "slides"), "--out", str(tmp_path / "out"), "--device", device]
    if device == "cpu":
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    else:
        launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    launch += ["--main_process_port" if device == "auto" else "--master_port", str(free_port())]
    done = subprocess.run(
        **command(sys.executable, *launch, str(tmp_path / "watched.py"), *arguments, "--tile_px", "64"),
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 done, 1 failed, 0 skipped") == 1
    assert sorted(re.findall(r"SHARE (\d) (\d) (\d)", done.stdout)) == [("0", "2", "2"), ("1", "2", "2")]
    single = extract_slides(
        sorted((tmp_path / "slides").glob("*.tif")), tmp_path / "one", ExtractOptions(tile_px=64), progress=False
    )
    for status in single:
        here, there = (read_features(tmp_path / f"{out}/features/{status.id}.h5") for out in ("one", "out"))
        np.testing.assert_array_equal(here.coords, there.coords)
        np.testing.assert_allclose(here.features, there.features, atol=1e-4)
