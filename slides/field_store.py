"""Features of fields of view, thousands in a file and found by the content of the image.

A store is a folder of shards. A shard is a safetensors file that is written once, whole, under a name of its own, so
that any number of processes add to a store at once and a kill loses no more than what was not yet written:

    keys      I64 (n, 4)       SHA-256 of each image file
    checks    U32 (n,)         CRC-32 of each field's key, shape and features
    shapes    I32 (n, 2)       rows and columns of each field's map
    features  F16 (cells, d)   the maps one after another, each row by row

Reading maps the file into memory. The index stands before the features, so that a shard that was cut short still gives
the fields before the cut; the check tells where the features of one are not those that were written.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from frugalpath.errors import InputError
from frugalpath.files import atomic_write
from frugalpath.slides.store import Features, count_features, features_dim, read_features

logger = logging.getLogger(__name__)

FORMAT = "frugalpath.fields/1"
SUFFIX = ".safetensors"
SHARD_BYTES = 64 * 2**20
"""Number of features after which a shard is written."""
PAUSES = (10.0, 300.0)
"""Bounds of the seconds after which a smaller shard is written: a twentieth of the time since filling began."""
MAX_HEADER = 2**20
_TYPES = {"keys": "<i8", "checks": "<u4", "shapes": "<i4", "features": "<f2"}
_CODES = {"keys": "I64", "checks": "U32", "shapes": "I32", "features": "F16"}


@dataclass(frozen=True)
class StoredField:
    """Location of a field's features: a store and the SHA-256 of the image file, in hex."""

    store: FieldStore
    key: str


def load_stored(where: str | StoredField) -> Features:
    """Load features from a path (HDF5, see `frugalpath.slides.store.read_features`) or a store of fields.

    Raises:
        InputError: missing or damaged.
    """
    return where.store.read(where.key) if isinstance(where, StoredField) else read_features(where)


def count_stored(where: str | StoredField) -> int:
    """Count features without reading them."""
    return where.store.count(where.key) if isinstance(where, StoredField) else count_features(where)


def stored_dim(where: str | StoredField) -> int:
    """Width of features, without reading them."""
    return where.store.dim(where.key) if isinstance(where, StoredField) else features_dim(where)


class FieldStore:
    """The shards of one setting (encoder and size of the fields) in a folder.

    Use it in a `with` block to add fields; they are written at its end, even after an error.

    Args:
        folder: may hold shards of other settings, and other files.
        setting: names the encoder and the size at which it was shown the fields.
        stride: px per cell of the encoder's map.
        encoder, fingerprint: name and fingerprint of the encoder.
    """

    def __init__(self, folder: str | Path, setting: str, *, stride: int, encoder: str, fingerprint: str):
        self.folder, self.setting = Path(folder), setting
        self.stride, self.encoder, self.fingerprint = stride, encoder, fingerprint
        self._shards: dict[str, _Shard] = {}
        self._keys = np.empty(0, "S32")
        self._places = np.empty((0, 2), np.int64)
        self._names: list[str] = []
        self._pending: list[tuple[bytes, np.ndarray]] = []
        self._pending_bytes = 0
        self._began = self._written = time.monotonic()
        self.refresh()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FieldStore) and (self.folder, self.setting) == (other.folder, other.setting)

    def __hash__(self) -> int:
        return hash((self.folder, self.setting))

    def __reduce__(self) -> tuple:
        # Another process maps the files itself.
        own = {"stride": self.stride, "encoder": self.encoder, "fingerprint": self.fingerprint}
        return _reopened, (self.folder, self.setting, own)

    def refresh(self) -> None:
        """Load shards written by this or another process."""
        names = {p.name: p for p in self.folder.glob(f"{self.setting}-*{SUFFIX}")}
        fresh = {name: p for name, p in sorted(names.items()) if name not in self._shards}
        if not fresh:
            return
        for name, path in fresh.items():
            self._shards[name] = _Shard(path)
        self._names = list(self._shards)
        parts = list(self._shards.values())
        keys = np.concatenate([s.keys for s in parts])
        places = np.concatenate([_numbered(i, len(s.keys)) for i, s in enumerate(parts)])
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], places[order]

    def __len__(self) -> int:
        return len(np.unique(self._keys))

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Keys that are in no shard."""
        if not keys or not len(self._keys):
            return list(keys)
        wanted = np.frombuffer(bytes.fromhex("".join(keys)), "S32")
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return [key for key, there in zip(keys, self._keys[at] == wanted, strict=True) if not there]

    def count(self, key: str) -> int:
        """Number of features of a field.

        Raises:
            InputError: it is not in the store.
        """
        shard, record = self._find(key)[0]
        return int(shard.shapes[record].prod())

    def dim(self, key: str) -> int:
        """Width of a field's features.

        Raises:
            InputError: it is not in the store.
        """
        shard, _ = self._find(key)[0]
        return int(shard.features.shape[1])

    def read(self, key: str) -> Features:
        """Features of a field, float32, with the attributes of `frugalpath.slides.store.Features`.

        Raises:
            InputError: it is not in the store, or its features are damaged.
        """
        found = self._find(key)
        for shard, record in found:  # several processes may each have written it
            cells = shard.read(record)
            if cells is not None:
                rows, columns = shard.shapes[record].tolist()
                return self._features(cells, rows, columns)
        paths = ", ".join(str(shard.path) for shard, _ in found)
        raise InputError(
            f"{paths}: damaged, the features of a field are not those that were written; delete the file and run the "
            "command again, which encodes its fields anew"
        )

    def add(self, key: str, cells: np.ndarray) -> None:
        """Add a field; it is available once it is written together with others.

        Args:
            cells: (rows, columns, d) float16.

        Raises:
            InputError: the folder cannot be written to.
        """
        self._pending.append((bytes.fromhex(key), cells))
        self._pending_bytes += cells.nbytes
        now = time.monotonic()
        pause = min(max((now - self._began) / 20, PAUSES[0]), PAUSES[1])
        if self._pending_bytes >= SHARD_BYTES or now - self._written > pause:
            self.flush()

    def flush(self) -> None:
        """Write the added fields as a shard.

        Raises:
            InputError: the folder cannot be written to.
        """
        if not self._pending:
            return
        shapes = np.array([cells.shape[:2] for _, cells in self._pending], np.int32)
        flat = [np.ascontiguousarray(cells.reshape(-1, cells.shape[-1])) for _, cells in self._pending]
        checks = [_check(key, shape, f) for (key, _), shape, f in zip(self._pending, shapes, flat, strict=True)]
        tensors = {
            "keys": np.frombuffer(b"".join(key for key, _ in self._pending), "<i8").reshape(-1, 4),
            "checks": np.array(checks, np.uint32),
            "shapes": shapes,
            "features": np.concatenate(flat),
        }
        about = {
            "format": FORMAT,
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "stride": str(self.stride),
        }
        try:
            with atomic_write(self.folder / f"{self.setting}-{uuid.uuid4().hex[:16]}{SUFFIX}") as part:
                save_file(tensors, part, about)
        except OSError as error:
            raise InputError(
                f"{self.folder}: features cannot be written ({error.strerror or error}); free space there, or choose "
                "another folder"
            ) from error
        self._pending, self._pending_bytes, self._written = [], 0, time.monotonic()
        self.refresh()

    def __enter__(self) -> FieldStore:
        self._began = self._written = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _find(self, key: str) -> list[tuple[_Shard, int]]:
        wanted = np.frombuffer(bytes.fromhex(key), "S32")
        start, end = (int(np.searchsorted(self._keys, wanted, side)[0]) for side in ("left", "right"))
        if start == end:
            raise InputError(f"{self.folder}: no features of this image; give the command again, which encodes it")
        return [(self._shards[self._names[shard]], record) for shard, record in self._places[start:end].tolist()]

    def _features(self, cells: np.ndarray, rows: int, columns: int) -> Features:
        down, across = np.mgrid[:rows, :columns] * self.stride
        attrs = {
            "encoder": self.encoder,
            "fingerprint": self.fingerprint,
            "patch_size": self.stride,
            "width": columns * self.stride,
            "height": rows * self.stride,
        }
        return Features(cells, np.stack([across.ravel(), down.ravel()], 1), attrs)


class _Shard:
    """Intact fields of a shard; an unusable shard has none, with one warning."""

    def __init__(self, path: Path):
        self.path = path
        self.keys = np.empty(0, "S32")
        try:
            whole_fields, stated = self._open()
        # What a damaged header may lead to, down to numbers of any size and any depth.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            logger.warning("%s: no store of features, or damaged (%s); its fields are encoded again", path, error)
            return
        if whole_fields < stated:
            logger.warning("%s: cut short; %d of its %d fields are left", path, whole_fields, stated)

    def _open(self) -> tuple[int, int]:
        """Map the file; return the numbers of intact and of all fields."""
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER, size - 8):
                raise ValueError("its header is incomplete")
            header = json.loads(file.read(length))
            about = header["__metadata__"]
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {str(about['format'])[:40]!r}, not {FORMAT!r}")
            tensors = {}
            for name in ("keys", "checks", "shapes"):
                dtype, shape, start, end = _described(header[name], name)
                if 8 + length + end > size:
                    raise ValueError("its index is incomplete")
                file.seek(8 + length + start)
                tensors[name] = np.frombuffer(file.read(end - start), dtype).reshape(shape)
        dtype, (cells, dim), start, _ = _described(header["features"], "features")
        counts = tensors["shapes"].astype(np.int64).prod(1)
        ends = np.cumsum(counts)
        n = len(counts)
        if (tensors["shapes"] < 1).any() or not n == len(tensors["keys"]) == len(tensors["checks"]):
            raise ValueError("its index is inconsistent")
        if not n or ends[-1] != cells:
            raise ValueError(f"its index is of {ends[-1] if n else 0} features, {cells} are stated")
        offset = 8 + length + start
        present = max(0, size - offset) // (dim * 2)
        kept = int(np.searchsorted(ends, present, "right"))
        self.shapes, self.checks, self.starts = tensors["shapes"], tensors["checks"], ends - counts
        if kept:
            held = int(ends[kept - 1])
            self.features = np.memmap(self.path, dtype, "r", offset=offset, shape=(held, dim))
        self.keys = np.ascontiguousarray(tensors["keys"][:kept]).view("S32").ravel()
        self.raw_keys = tensors["keys"]
        return kept, n

    def read(self, record: int) -> np.ndarray | None:
        """Features (cells, d) float16 of a field; None if damaged."""
        start = int(self.starts[record])
        cells = self.features[start : start + int(self.shapes[record].prod())]
        whole_ = _check(self.raw_keys[record].tobytes(), self.shapes[record], cells) == int(self.checks[record])
        return cells if whole_ else None


def _described(entry: dict, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first and last byte of a tensor, from the header."""
    shape = tuple(int(n) for n in entry["shape"])
    start, end = (int(n) for n in entry["data_offsets"])
    dtype = _TYPES[name]
    sides = 1 if name == "checks" else 2
    if entry["dtype"] != _CODES[name] or len(shape) != sides or min(shape) < 0 or start < 0:
        raise ValueError(f"{name} is {entry['dtype']} {shape}")
    if end - start != int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize:
        raise ValueError(f"{name} has {end - start} bytes for {shape}")
    return dtype, shape, start, end


def _check(key: bytes, shape: np.ndarray, cells: np.ndarray) -> int:
    head = key + np.asarray(shape, "<i4").tobytes()
    return zlib.crc32(np.ascontiguousarray(cells).view(np.uint8).reshape(-1).data, zlib.crc32(head))


def _numbered(shard: int, count: int) -> np.ndarray:
    return np.stack([np.full(count, shard), np.arange(count)], 1)


def _reopened(folder: Path, setting: str, own: dict) -> FieldStore:
    return FieldStore(folder, setting, **own)
