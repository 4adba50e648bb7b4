"""The feature file of a slide: HDF5 with `features` (N, d) and `coords` (N, 2).

CLAM and TRIDENT read what is written here, and what they write is read: CLAM's files have the two datasets and no
attributes (`save_hdf5` of CLAM), TRIDENT's carry attributes on `coords` and may have features of shape (1, N, d)
(`save_h5` of TRIDENT).
"""

from __future__ import annotations

import glob
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil

from slides.errors import InputError

# The names TRIDENT gives on `coords` to what the root attributes here call otherwise.
_TRIDENT = {"patch_size_level0": "patch_size", "level0_width": "width", "level0_height": "height"}


@dataclass
class Features:
    """The features of one slide.

    Attributes:
        features: (N, d) float32.
        coords: (N, 2) int64, x and y of each feature's upper left corner in level-0 pixels.
        attrs: what is known about them; any of `encoder`, `patch_size` (side at level 0 of the square that a feature
            describes, px), `mpp` (of the tiles that were encoded, microns per pixel), `level0_mpp`, `width`, `height`
            (of level 0, px), `tile_px`, `cells` and others. Values are text, numbers, booleans or flat lists of them.
    """

    features: np.ndarray
    coords: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features = np.asarray(self.features, dtype=np.float32)
        self.coords = np.asarray(self.coords, dtype=np.int64)
        problem = _shape_problem(self.features, self.coords)
        if problem:
            raise InputError(f"slide features: {problem}")

    def __len__(self) -> int:
        return len(self.features)


class FeatureWriter:
    """Writes a feature file in parts, so that the features of a slide need not fit in memory.

    Use it in a `with` block: at its end the file takes its name; after an error nothing is left behind and an older
    file of that name is untouched.
    """

    def __init__(self, path: str | os.PathLike, rows: int, dim: int, *, dtype: str = "float32"):
        """Open a temporary file next to `path` for `rows` features of `dim` values; `dtype` float32 or float16."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.path.name}.{platform.node()}-"
        for left in self.path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
            process = left.name.removeprefix(prefix).removesuffix(".tmp")
            if process.isdigit() and not psutil.pid_exists(int(process)):
                left.unlink(missing_ok=True)  # of a run that was killed
        self._temporary = self.path.with_name(f"{prefix}{os.getpid()}.tmp")
        self._file = h5py.File(self._temporary, "w")
        self._features = self._file.create_dataset("features", (rows, dim), dtype=dtype)
        self._coords = self._file.create_dataset("coords", (rows, 2), dtype="int64")
        self._attrs: dict[str, Any] = {}
        self._row = 0

    def append(self, features: np.ndarray, coords: np.ndarray) -> None:
        """Add features (n, d) and coords (n, 2)."""
        end = self._row + len(features)
        self._features[self._row : end] = features
        self._coords[self._row : end] = coords
        self._row = end

    def set_attrs(self, attrs: dict[str, Any]) -> None:
        """Set the attributes; those that are None are left out."""
        self._attrs = {key: value for key, value in attrs.items() if value is not None}

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    if self._row != len(self._coords):
                        raise ValueError(f"{self.path}: {self._row} of {len(self._coords)} rows were written")
                    self._file.attrs.update(self._attrs)
                    self._coords.attrs.update(_trident_attrs(self.path.stem, self._attrs))
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_features(path: str | os.PathLike, features: Features, *, dtype: str = "float32") -> None:
    """Write a feature file atomically: a reader sees the old file or the whole new one.

    Args:
        path: the `.h5` file; its folder is made.
        features: what to write.
        dtype: `float32`, or `float16` for half the size (read back as float32).
    """
    with FeatureWriter(path, *features.features.shape, dtype=dtype) as writer:
        writer.append(features.features, features.coords)
        writer.set_attrs(features.attrs)


def read_features(path: str | os.PathLike) -> Features:
    """Read a feature file written here, by CLAM or by TRIDENT.

    `attrs["patch_size"]` is what the file states or, where it states none (CLAM), the spacing of the coordinates,
    with `attrs["patch_size_source"] = "spacing of coords"`.

    Raises:
        InputError: no such file, not HDF5, a dataset missing or of a wrong shape; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such feature file; write it with `python -m slides.extract`")
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "coords") if name not in file]
            if missing:
                raise InputError(
                    f"{path}: no dataset {' and no dataset '.join(missing)} (found {sorted(file) or 'none'}); "
                    "a feature file has `features` (N, d) and `coords` (N, 2)"
                )
            features, coords = file["features"][()], file["coords"][()]
            attrs = _plain(file["features"].attrs) | _plain(file["coords"].attrs) | _plain(file.attrs)
            own = "patch_size" in file.attrs
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}); extract this slide again") from error
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    if coords.ndim == 3 and coords.shape[0] == 1:
        coords = coords[0]
    problem = _shape_problem(features, coords)
    if problem:
        raise InputError(f"{path}: {problem}; extract this slide again")
    if not np.isfinite(features).all():
        raise InputError(f"{path}: features hold NaN or infinite values; extract this slide again")
    return Features(features, coords, attrs if own else _translate(attrs, coords))


def count_features(path: str | os.PathLike) -> int:
    """Number N of features of a file that `read_features` reads, without reading them."""
    with h5py.File(path, "r") as file:
        return int(file["coords"].shape[-2])


def _shape_problem(features: np.ndarray, coords: np.ndarray) -> str | None:
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        return f"features must be numbers of shape (N, d), got {features.dtype} {features.shape}"
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "fiu":
        return f"coords must be numbers of shape (N, 2), got {coords.dtype} {coords.shape}"
    if len(features) != len(coords):
        return f"{len(features)} features but {len(coords)} coords"
    return None


def _trident_attrs(name: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """What TRIDENT's readers look for on `coords`; its `patch_size` is the tile's side in encoded pixels."""
    found = {theirs: attrs[ours] for theirs, ours in _TRIDENT.items() if ours in attrs}
    found |= {"name": name, "overlap": 0}
    if "tile_px" in attrs:
        found["patch_size"] = int(attrs["tile_px"]) // int(attrs.get("cells", 1))
    # Objective power is 10 over microns per pixel, the convention of both toolkits.
    if attrs.get("mpp"):
        found["target_magnification"] = 10 / float(attrs["mpp"])
    if attrs.get("level0_mpp"):
        found["level0_magnification"] = 10 / float(attrs["level0_mpp"])
    for key in ("patch_size_level0", "level0_width", "level0_height"):
        if key in found:
            found[key] = round(found[key])
    return found


def _translate(attrs: dict[str, Any], coords: np.ndarray) -> dict[str, Any]:
    """Foreign attributes in this package's terms."""
    found = dict(attrs)
    if "patch_size_level0" in attrs:
        found["tile_px"] = attrs.get("patch_size")
        found["patch_size"] = attrs["patch_size_level0"]
    elif {"patch_size", "downsample"} <= attrs.keys():  # CLAM's coordinate files: patch_size px at patch_level
        found["tile_px"] = attrs["patch_size"]
        found["patch_size"] = attrs["patch_size"] * float(np.max(attrs["downsample"]))
    else:
        spacing = _spacing(coords)
        if spacing:
            found["patch_size"], found["patch_size_source"] = spacing, "spacing of coords"
    for theirs, ours in _TRIDENT.items():
        if theirs in attrs:
            found.setdefault(ours, attrs[theirs])
    for theirs, ours in (("target_magnification", "mpp"), ("level0_magnification", "level0_mpp")):
        if attrs.get(theirs, 0) and attrs[theirs] > 0:
            found.setdefault(ours, 10 / float(attrs[theirs]))
    return found


def _spacing(coords: np.ndarray) -> int | None:
    """The greatest step that all coordinates are multiples of, per axis and then the larger; None for one tile."""
    steps = [np.diff(np.unique(coords[:, axis].astype(np.int64))) for axis in (0, 1)]
    found = [math.gcd(*step.tolist()) for step in steps if len(step)]
    return max(found) if found else None


def _plain(attrs: h5py.AttributeManager) -> dict[str, Any]:
    """Attributes as Python values: numpy scalars and arrays unwrapped, bytes decoded."""
    found = {}
    for key, value in attrs.items():
        if isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        found[key] = value.decode() if isinstance(value, bytes) else value
    return found
