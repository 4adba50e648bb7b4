"""The feature file of a slide: HDF5 with `features` (N, d) and `coords` (N, 2).

CLAM and TRIDENT read what is written here, and what they write is read: CLAM's files have the two datasets and no
attributes (`save_hdf5` of CLAM), TRIDENT's carry attributes on `coords` and may have features of shape (1, N, d)
(`save_h5` of TRIDENT).
"""

from __future__ import annotations

import glob
import math
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil

from frugalpath.errors import InputError

# The names TRIDENT gives on `coords` to what the root attributes here call otherwise.
_TRIDENT = {"patch_size_level0": "patch_size", "level0_width": "width", "level0_height": "height"}


MAX_VALUES = 2**33
"""Maximum values of a dataset: 6.7 million features of 1,280 values, several times those of a large slide."""
MAX_PACKED = 1100
"""Maximum compression ratio of a dataset: deflate reaches 1,032."""
_HEAP = b"GCOL\1"
_NUMBERS = ("patch_size", "mpp", "level0_mpp", "width", "height")


@dataclass
class Features:
    """The features of one slide.

    Attributes:
        features: (N, d) float32.
        coords: (N, 2) int64, x and y of each feature's upper left corner in level-0 pixels.
        attrs: metadata; any of `encoder`, `patch_size` (side at level 0 of the square that a feature
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
    """Write a feature file in parts, so that the features of a slide need not fit in memory.

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
        raise InputError(f"{path}: no such feature file; write it with `frugalpath extract`")
    with _datasets(path) as (file, stored, places):
        features = stored[()].reshape(stored.shape[-2:])
        coords = places[()].reshape(places.shape[-2:])
        attrs = _plain(stored.attrs) | _plain(places.attrs) | _plain(file.attrs)
        own = "patch_size" in file.attrs
    if not np.isfinite(features).all():
        raise InputError(f"{path}: features hold NaN or infinite values; extract this slide again")
    if not (np.abs(coords) < 2**53).all():
        raise InputError(f"{path}: coords hold invalid positions; extract this slide again")
    coords = coords.astype(np.int64)
    try:
        attrs = attrs if own else _translate(attrs, coords)
        wrong = [k for k in _NUMBERS if k in attrs and not 0 <= float(attrs[k]) < math.inf]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: an attribute is not a number ({error}); extract this slide again") from error
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {attrs[wrong[0]]}, which is not possible; extract this slide again")
    return Features(features, coords, attrs)


def count_features(path: str | os.PathLike) -> int:
    """Number of features in a file, without reading them."""
    with _datasets(Path(path)) as (_, _, coords):
        return int(coords.shape[-2])


def features_dim(path: str | os.PathLike) -> int:
    """Width of the features in a file, without reading them."""
    with _datasets(Path(path)) as (_, features, _):
        return int(features.shape[-1])


@contextmanager
def _datasets(path: Path) -> Iterator[tuple[h5py.File, h5py.Dataset, h5py.Dataset]]:
    """A file with its datasets `features` and `coords`, of which nothing has been read but the shapes.

    Raises:
        InputError: they are not there, not in the file itself, state more values than it holds, or are not readable,
            here or in the block.
    """
    try:
        if _endless(path):
            raise InputError(f"{path}: its heap of texts is damaged; extract this slide again")
        with h5py.File(path, "r") as file:
            missing = [name for name in ("features", "coords") if name not in file]
            if missing:
                raise InputError(
                    f"{path}: no dataset {' and no dataset '.join(missing)} (found {sorted(file)[:20] or 'none'}); "
                    "a feature file has `features` (N, d) and `coords` (N, 2)"
                )
            problem = next(filter(None, (_storage_problem(file, name) for name in ("features", "coords"))), None)
            problem = problem or _shape_problem(file["features"], file["coords"])
            if problem:
                raise InputError(f"{path}: {problem}; extract this slide again")
            yield file, file["features"], file["coords"]
    except InputError:
        raise
    # h5py tells what is broken by almost any error; what is too large for the machine is told by MemoryError.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error}); extract this slide again") from error


def _endless(path: Path) -> bool:
    """Whether the HDF5 library (2.0 and earlier) would loop forever on the file.

    It goes through a heap of texts from object to object; where damaged bytes say that one takes no space, or a
    negative one, it comes back to where it was. https://support.hdfgroup.org: file format, III.E, Global Heap.
    """
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_HEAP)
            while at >= 0:
                end = at + int.from_bytes(data[at + 8 : at + 16], "little")
                place = at + 16
                while place + 16 <= end <= len(data):
                    index, size = struct.unpack("<H6xQ", data[place : place + 16])
                    step = (16 + -(-size // 8) * 8 if index else size) % 2**64
                    if step == 0 or step >= 2**63:
                        return True
                    place += step
                at = data.find(_HEAP, at + 1)
    return False


def _storage_problem(file: h5py.File, name: str) -> str | None:
    """Reason not to read a dataset: it refers to other files, or states more than the file can hold."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return f"{name} is a link to another file, which is not followed"
    data = file[name]
    if not isinstance(data, h5py.Dataset) or data.shape is None:
        return f"{name} is not a dataset of numbers"
    if data.is_virtual or data.external:
        return f"the values of {name} are in other files, which are not read"
    if data.size > MAX_VALUES:
        return f"{name} states {data.size:,} values, more than {MAX_VALUES:,}"
    packed = MAX_PACKED if data.id.get_create_plist().get_nfilters() else 1
    if data.id.get_storage_size() * packed < data.nbytes:
        return f"{name} states {data.size:,} values, of which the file holds only a part"
    return None


def _shape_problem(features: np.ndarray | h5py.Dataset, coords: np.ndarray | h5py.Dataset) -> str | None:
    """A dataset may have one more dimension of 1 before the others, as TRIDENT writes it."""
    many, places = (
        data.shape[1:]
        if isinstance(data, h5py.Dataset) and len(data.shape) == 3 and data.shape[0] == 1
        else data.shape
        for data in (features, coords)
    )
    if len(many) != 2 or features.dtype.kind not in "fiu":
        return f"features must be numbers of shape (N, d), got {features.dtype} {features.shape}"
    if len(places) != 2 or places[1] != 2 or coords.dtype.kind not in "fiu":
        return f"coords must be numbers of shape (N, 2), got {coords.dtype} {coords.shape}"
    if many[0] != places[0]:
        return f"{many[0]} features but {places[0]} coords"
    return None


def _trident_attrs(name: str, attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes of `coords` that TRIDENT reads; its `patch_size` is the tile's side in encoded pixels."""
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
    """Translate attributes of other tools to this package's names."""
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
        found[key] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return found
