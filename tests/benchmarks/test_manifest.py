"""The benchmark of manifests on a handful of rows."""

from __future__ import annotations

import hashlib

import pytest

from benchmarks.manifest import MANIFESTS, image_name, measure, parse, write
from frugalpath.envs.manifest import build


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    made = parse(["--rows", "60", "--folder", str(tmp_path_factory.mktemp("bench")), "--repeats", "1", "--cores", "1"])
    write(made)
    return made


def test_images_are_all_different_and_written_once(options):
    paths = [options.folder / image_name(n) for n in range(60)]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}) == 60
    before = [path.stat().st_mtime_ns for path in paths]
    write(options)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_all_manifests_are_of_the_same_images(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answers = set()
    for _, file, params in MANIFESTS.values():
        cases = build(path=str(options.folder / file.format(60)), **params)
        assert [case.images for case in cases] == [(str(options.folder / image_name(n)),) for n in range(60)]
        assert {case.split for case in cases} == {"train", "val", "test"}
        answers.add(tuple(case.answer for case in cases))
    assert len(answers) == 1


@pytest.mark.slow
def test_readings_are_measured(options):
    found = measure("labels_csv", options)
    assert found["cases"] == 60 and found["again_s"] > 0 and found["cache_mb"] > 0
    assert 0.03 < found["again_peak_gb"] < 2 and not list(options.folder.glob("tmp*"))
