"""The ingest benchmark reads what it should and prints its keys; the speed itself is not tested here."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest

from frugalpath.slides.reader import SlideReader

PATH = Path(__file__).resolve().parents[2] / "benchmarks/ingest.py"


@pytest.fixture(scope="module")
def ingest():
    spec = importlib.util.spec_from_file_location("ingest_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("odd", [False, True])
def test_measure(ingest, tmp_path, odd):
    path = tmp_path / "pyramid.tiff"
    ingest.write_pyramid(path, columns=2, rows=1, odd=odd)
    with SlideReader(path, "openslide") as reader:
        assert float(reader.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert all(down == round(down) for down in reader.level_downsamples) is not odd
    arguments = argparse.Namespace(repeats=1, cores=2, encode_tiles=0 if odd else 2)
    found = ingest.measure(str(path), arguments)
    assert found["n"] == found["tiles"] == 2
    assert found["openslide_ratio"] > 0
    assert ("end_to_end_openslide_ratio" in found) is not odd
