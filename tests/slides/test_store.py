"""Feature files: round trip, what CLAM and TRIDENT write, broken files."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import h5py
import numpy as np
import pytest

from frugalpath.errors import InputError
from frugalpath.slides.store import Features, read_features, write_features


@pytest.fixture
def features() -> Features:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2) * 448
    attrs = {
        "encoder": "e@1",
        "patch_size": 448.5,
        "mpp": 2.0,
        "level0_mpp": 0.5,
        "width": 2000,
        "height": 1500,
        "tile_px": 112,
        "cells": 1,
    }
    return Features(rng.normal(size=(12, 5)), grid, attrs)


def test_round_trip(tmp_path, features):
    path = tmp_path / "new" / "a.h5"
    write_features(path, features)
    again = read_features(path)
    assert again.features.dtype == np.float32
    np.testing.assert_array_equal(again.features, features.features)
    np.testing.assert_array_equal(again.coords, features.coords)
    assert features.attrs.items() <= again.attrs.items()
    assert [file.name for file in path.parent.iterdir()] == ["a.h5"]


def test_half_precision_is_read_as_float32(tmp_path, features):
    write_features(tmp_path / "a.h5", features, dtype="float16")
    again = read_features(tmp_path / "a.h5")
    assert again.features.dtype == np.float32
    np.testing.assert_allclose(again.features, features.features, atol=2e-3)


def test_a_failed_write_leaves_the_old_file(tmp_path, features):
    path = tmp_path / "a.h5"
    write_features(path, features)
    bad = Features(features.features, features.coords, {"odd": object()})
    with pytest.raises(TypeError):
        write_features(path, bad)
    assert len(read_features(path)) == 12
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed(tmp_path, features):
    host = platform.node()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".a.h5.{host}-{gone.pid}.tmp", f".a.h5.{host}-{os.getppid()}.tmp", f".b.h5.{host}-{gone.pid}.tmp"]
    for name in names:
        (tmp_path / name).touch()
    write_features(tmp_path / "a.h5", features)
    # That of a process that lives and that of another slide stay.
    assert {file.name for file in tmp_path.iterdir()} == {"a.h5", *names[1:]}


def test_trident_finds_its_attributes(tmp_path, features):
    """What TRIDENT's slide encoders and CLAM's bag datasets read."""
    write_features(tmp_path / "a.h5", features)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["features"][:].shape == (12, 5)
        assert file["coords"][:].dtype.kind == "i"
        attrs = file["coords"].attrs
        assert attrs["patch_size_level0"] == 448
        assert attrs["patch_size"] == 112
        assert attrs["target_magnification"] == 5
        assert attrs["level0_magnification"] == 20
        assert attrs["level0_width"] == 2000
        assert attrs["name"] == "a"


def test_reads_trident(tmp_path, features):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["features"] = features.features[None]
        file["coords"] = features.coords
        file["features"].attrs["encoder"] = "uni_v1"
        file["coords"].attrs.update(
            patch_size=512, patch_size_level0=1024, target_magnification=20, level0_magnification=40, level0_width=9000
        )
    found = read_features(tmp_path / "t.h5")
    assert found.features.shape == (12, 5)
    assert found.attrs["patch_size"] == 1024
    assert found.attrs["tile_px"] == 512
    assert found.attrs["mpp"] == 0.5
    assert found.attrs["level0_mpp"] == 0.25
    assert found.attrs["width"] == 9000
    assert found.attrs["encoder"] == "uni_v1"


def test_reads_clam(tmp_path, features):
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("features", data=features.features, maxshape=(None, 5), chunks=(1, 5))
        file.create_dataset("coords", data=features.coords.astype(np.int32), maxshape=(None, 2), chunks=(1, 2))
    found = read_features(tmp_path / "c.h5")
    np.testing.assert_array_equal(found.features, features.features)
    assert found.attrs == {"patch_size": 448, "patch_size_source": "spacing of coords"}


def test_reads_clam_with_coordinate_attributes(tmp_path, features):
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = features.features
        file["coords"] = features.coords
        file["coords"].attrs.update(patch_size=256, patch_level=1, downsample=np.array([4.0, 4.0]))
    assert read_features(tmp_path / "c.h5").attrs["patch_size"] == 1024


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"coords": np.zeros((3, 2))}, "no dataset features"),
        ({"features": np.zeros((3, 4)), "coords": np.zeros((2, 2))}, "3 features but 2 coords"),
        ({"features": np.zeros((2, 3, 4)), "coords": np.zeros((3, 2))}, "shape"),
        ({"features": np.full((3, 4), np.nan), "coords": np.zeros((3, 2))}, "NaN"),
    ],
)
def test_broken_files_are_named(tmp_path, datasets, message):
    path = tmp_path / "b.h5"
    with h5py.File(path, "w") as file:
        for key, value in datasets.items():
            file[key] = value
    with pytest.raises(InputError, match=message) as caught:
        read_features(path)
    assert "b.h5" in str(caught.value)


def test_not_hdf5_and_absent(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n but cut short")
    with pytest.raises(InputError, match=r"x\.h5: cannot be read as HDF5"):
        read_features(tmp_path / "x.h5")
    with pytest.raises(InputError, match="no such feature file"):
        read_features(tmp_path / "absent.h5")
