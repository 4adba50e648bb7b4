"""Real slides of several formats, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frugalpath.slides.extraction import extract_slides
from frugalpath.slides.jobs import find_jobs
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.reader import SlideReader
from frugalpath.slides.store import read_features

FOLDER = Path(__file__).resolve().parents[3] / "shared/data/slides"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no real slides here")

# What becomes of each, and a part of its reason.
EXPECTED = {
    "metaplasia__HE": ("done", ""),
    "metaplasia__trypsin": ("skipped", "stain trypsin"),
    "lung-squamous-cell-carcinoma__HE3": ("done", ""),
    "cmu-1-small-region": ("done", ""),
    "BS21-native-40x": ("done", ""),
    "congestion-spleen__HE": ("failed", "scanned at 4.035 mpp"),
    "broken": ("failed", "not a slide"),
    "ezwsi-camelyon": ("failed", "openslide.mpp-x = 28.96"),
    "slaid-test": ("failed", "unknown scale"),
    "helicobacterpylori__HE": ("failed", "tiff.ResolutionUnit = none"),
    "slideio-tritc": ("failed", "dark background"),
}


@pytest.fixture(scope="module")
def jobs():
    return [job for job in find_jobs(FOLDER) if job.id in EXPECTED]


def test_each_is_done_or_has_its_reason(jobs, tmp_path, encoder):
    statuses = extract_slides(jobs, tmp_path, ExtractOptions(), encoder=encoder, progress=False)
    assert {status.id for status in statuses} == EXPECTED.keys()
    for status in statuses:
        expected, reason = EXPECTED[status.id]
        assert (status.id, status.status) == (status.id, expected)
        assert reason in status.reason
    # The 40x scan read at its second level shows the same tissue as the 5x copies do: pink, on 4 to 6 cm of core.
    found = read_features(tmp_path / "features/BS21-native-40x.h5")
    assert found.attrs["level"] == 1 and found.attrs["patch_size"] == pytest.approx(224 * 2 / 0.2524)
    assert 60 < len(found) < 110
    assert np.mean(found.features[:, 0] > found.features[:, 1]) > 0.9


def test_an_override_lets_them_in(jobs, tmp_path, encoder):
    wanted = [job for job in jobs if job.id in ("helicobacterpylori__HE", "metaplasia__trypsin")]
    options = ExtractOptions(slide_mpp=2.0, stains=["any"], mpp=4.0)
    first, second = extract_slides(wanted, tmp_path, options, encoder=encoder, progress=False)
    assert (first.status, first.mpp_source) == ("done", "--slide-mpp")
    assert (second.status, second.mpp_source) == ("done", "openslide.mpp-x")


@pytest.mark.parametrize("name", ["metaplasia__HE.tiff", "cmu-1-small-region.svs", "BS21-native-40x.tiff"])
def test_backends_agree(name):
    pytest.importorskip("fastslide")
    with SlideReader(FOLDER / name, "fastslide") as fast, SlideReader(FOLDER / name, "openslide") as plain:
        level = len(plain.level_dimensions) - 1
        width, height = plain.level_dimensions[level]
        box = (width // 4, height // 4, width // 4 + 500, height // 4 + 500)
        ours, theirs = (reader.read(level, box, (224, 224)).astype(int) for reader in (fast, plain))
    # OpenSlide interpolates where levels are not scaled by whole numbers, by up to half a pixel.
    assert np.abs(ours - theirs).mean() < 3
