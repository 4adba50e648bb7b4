"""Disk cache of a frozen vision tower's features, shared by steps, runs and processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import PIL.Image
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save

from frugalpath.errors import InputError
from frugalpath.files import atomic_write

logger = logging.getLogger(__name__)

KEEP = 0.9
"""Share of the limit that eviction leaves."""
WALK_EVERY = 0.05
"""Share of the limit that a process adds before it counts the folder again: others add to it as well."""
PART_AGE = 3600.0
"""Seconds after which a temporary file has lost its process."""


class FeatureCache:
    """Feature tensors in files `folder/key[:2]/key.safetensors`; several processes may share the folder.

    The least recently used files go when the folder grows over its limit. With n processes it may pass the limit by
    n times (5 % of it and one value) before one of them notices. Features come back in the dtype they were stored in.

    Args:
        folder: where the files lie; made when it is missing.
        limit_gb: size limit of all files, in GB (1e9 bytes).
        dtype: features are cast to it before they are stored; None keeps theirs.

    Raises:
        InputError: the limit is not positive or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, limit_gb: float = 20.0, dtype: torch.dtype | None = None):
        if not limit_gb > 0:
            raise InputError(f"limit_gb of the feature cache is {limit_gb}; give a size above 0, in GB")
        self.folder = Path(folder)
        self.limit = int(limit_gb * 1e9)
        self.dtype = dtype
        self.hits = 0
        self.misses = 0
        self._allowance = 0  # bytes this process may add before the folder is counted again
        self._warned = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, key: str) -> torch.Tensor | None:
        """Get features (n, hidden) on the CPU and mark them as used; None if absent or damaged."""
        path = self._path(key)
        try:
            os.utime(path)
            data = path.read_bytes()  # not mapped: on a network disk a map dies with a file that another one evicts
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self.misses += 1
            return None
        try:
            features = load(data)["features"]
        except (SafetensorError, KeyError) as error:
            logger.warning("%s: damaged (%s); removed, its features are computed again", path, error)
            path.unlink(missing_ok=True)
            self.misses += 1
            return None
        self.hits += 1
        return features

    def put(self, key: str, features: torch.Tensor) -> None:
        """Store features (n, hidden); existing keys are not replaced, values over the limit are not stored.

        Raises:
            InputError: the folder can no longer be written.
        """
        path = self._path(key)
        if path.exists():
            return
        features = features.detach().to("cpu", self.dtype or features.dtype).contiguous()
        data = save({"features": features})
        if len(data) > self.limit:
            if not self._warned:
                logger.warning(
                    "features of %d bytes are over the limit of %s (%d bytes) and are not kept; raise limit_gb",
                    *(len(data), self.folder, self.limit),
                )
            self._warned = True
            return
        try:
            with atomic_write(path) as part:
                part.write_bytes(data)
            self._allowance -= len(data)
            if self._allowance < 0:
                self._trim()
        except OSError as error:
            raise self._unwritable(error) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _unwritable(self, error: OSError) -> InputError:
        remedy = "name a folder you may write to, on a disk with free space"
        return InputError(f"{self.folder}: cannot write the feature cache ({error}); {remedy}")

    def _trim(self) -> None:
        """Count the folder and, when it is over the limit, remove the least recently used files."""
        with FileLock(self.folder / ".lock"):
            files = []  # (time of last use, bytes, path)
            for path in self.folder.glob("*/*"):
                with contextlib.suppress(FileNotFoundError):  # a damaged or temporary file, gone since it was listed
                    stat = path.stat()
                    if path.suffix == ".safetensors":
                        files.append((stat.st_mtime_ns, stat.st_size, path))
                    elif path.suffix == ".part" and time.time() - stat.st_mtime > PART_AGE:
                        path.unlink()
            total = sum(size for _, size, _ in files)
            if total > self.limit:
                for _, size, path in sorted(files)[:-1]:  # the newest stays: alone it is within the limit
                    if total < KEEP * self.limit:
                        break
                    path.unlink(missing_ok=True)
                    total -= size
        self._allowance = min(self.limit - total, int(WALK_EVERY * self.limit))


def cache_key(content: bytes | str, grid: Sequence[int], revision: str) -> str:
    """Hex digest of everything that features depend on.

    Args:
        content: the bytes of the image, or their hash when it is already made.
        grid: patches the image is cut into (its realised size, so the budget).
        revision: of the vision tower, see `module_revision`.
    """
    digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content
    return hashlib.sha256(json.dumps([digest, [int(side) for side in grid], revision]).encode()).hexdigest()


def content_hash(source: str | Path | PIL.Image.Image) -> str:
    """Sha256 of a file's bytes (made once per path, size and time of change) or of an image's mode, size and pixels.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(source, PIL.Image.Image):
        pixels = source.convert("RGBA") if source.mode in ("P", "PA") else source  # the colours of a palette count
        return hashlib.sha256(f"{source.mode} {source.size} ".encode() + pixels.tobytes()).hexdigest()
    path = Path(source).resolve()
    try:
        stat = path.stat()
        return _file_hash(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check the path of the image") from error


@lru_cache(maxsize=100_000)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def module_revision(module: torch.nn.Module) -> str:
    """Short sha256 over the names, dtypes, shapes and bytes of a module's state; one tensor at a time is on the CPU.

    Raises:
        InputError: a parameter is empty, as those that a trainer shards are; all weights would look the same.
    """
    for name, parameter in module.named_parameters():
        if parameter.numel() == 0:
            raise InputError(f"parameter {name} is empty; take the revision before the weights are sharded")
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        # numpy knows no bfloat16, but any dtype can be seen as bytes
        sha.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]
