"""Cache of a manifest's checks, valid until the manifest, its files or a parameter changes.

The rows are read and become cases each time; that the files can be decoded, that nothing leaks between splits, which
split each case was put in and which are left out is found out once. What is kept holds no answer, path or patient but
hashes, a number for the split of each case, and names of columns. It lies in the cache of `frugalpath.slides.content`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sqlite3
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.envs.case import SPLITS, Case
from frugalpath.envs.table import Rows
from frugalpath.slides.content import open_cache

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Version of the checks and of their cached form."""
_PACKAGES = ("frugalpath", "numpy", "openslide-python", "openslide-bin", "pillow", "pyarrow")
_KEPT = 100  # outcomes; those used last


@dataclass(frozen=True)
class Source:
    """Current state of a manifest: `key` identifies all its outcome depends on, `state` reveals changes."""

    key: bytes
    state: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """Result of checking a manifest without problems.

    Attributes:
        files: `FoundFiles.digest` of all files.
        splits: of each case that the rows become, as index of SPLITS.
        kept: whether each of them is among the result.
        broken: numbers of the files that cannot be used and that their cases can do without.
        copies: how many cases were left out as copies.
        kinds: of the columns, for `frugalpath.envs.quick`.
    """

    files: str
    splits: np.ndarray
    kept: np.ndarray
    broken: Sequence[int] = ()
    copies: int = 0
    kinds: Mapping[str, str] | None = None


def identify(source: Path, params: Mapping[str, Any], listed: Rows | None = None) -> Source | None:
    """Cache key of a manifest's outcome; None if it cannot be read.

    Args:
        source: the manifest.
        params: of `frugalpath.envs.manifest.build`, with the root.
        listed: the rows of a folder, which is what it says.
    """
    try:
        if listed is None:
            state = _state(source)
            with open(source, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            state = ()
            text = "\0".join(map(str, (list(listed.columns), *listed.columns.values())))
            content = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    except (OSError, UnicodeError):
        return None
    versions = {name: _version(name) for name in _PACKAGES}
    # The order of options and labels counts, so keys are not sorted.
    text = json.dumps([_FORMAT, versions, str(source), content, params], default=repr)
    return Source(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), state)


def unchanged(source: Path, found: Source) -> bool:
    """Whether a manifest is unchanged since it was identified."""
    return not found.state or _state(source) == found.state


def _state(path: Path) -> tuple[int, ...]:
    now = os.stat(path)
    return now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a folder
        return ""


def files_of(cases: Sequence[Case]) -> Iterator[str]:
    """Paths of all files, those of one case after those of the other."""
    for case in cases:
        yield from case.images
        yield from case.slides


def recall(key: bytes) -> Outcome | None:
    """Read a cached outcome; a damaged one gives None and a warning."""
    try:
        with closing(_open()) as cache:
            row = cache.execute("SELECT value FROM outcomes WHERE key = ?", (key,)).fetchone()
            if row is None:
                return None
    except (OSError, sqlite3.Error) as error:
        logger.warning("no cache of checked manifests (%s); everything is checked again", error)
        return None
    try:
        return _unpack(row[0])
    except (ValueError, TypeError, LookupError, OSError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("the cached checks of this manifest are damaged (%s); everything is checked again", error)
        return None


def remember(key: bytes, outcome: Outcome) -> None:
    """Store an outcome in the cache."""
    try:
        with closing(_open()) as cache, cache:
            cache.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?)", (key, _pack(outcome), time.time()))
            cache.execute(
                "DELETE FROM outcomes WHERE key IN (SELECT key FROM outcomes ORDER BY made DESC LIMIT -1 OFFSET ?)",
                (_KEPT,),
            )
    except (OSError, sqlite3.Error) as error:
        logger.warning("the cache of checked manifests could not be written (%s)", error)


def _open() -> sqlite3.Connection:
    cache = open_cache()
    try:
        cache.execute("CREATE TABLE IF NOT EXISTS outcomes (key BLOB PRIMARY KEY, value BLOB, made INTEGER)")
    except sqlite3.Error:
        cache.close()
        raise
    return cache


def _pack(outcome: Outcome) -> bytes:
    head = json.dumps({name: getattr(outcome, name) for name in ("files", "broken", "copies", "kinds")})
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        head=np.frombuffer(head.encode(), np.uint8),
        splits=outcome.splits.astype(np.uint8),
        kept=outcome.kept.astype(bool),
    )
    content = buffer.getvalue()
    return hashlib.sha256(content).digest() + content


def _unpack(value: bytes) -> Outcome:
    digest, content = value[:32], value[32:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("its hash differs")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        head = json.loads(arrays["head"].tobytes())
        return Outcome(splits=arrays["splits"], kept=arrays["kept"], **head)


def split_codes(cases: Sequence[Case]) -> np.ndarray:
    """Split of each case as index of SPLITS."""
    code = {split: i for i, split in enumerate(SPLITS)}
    return np.fromiter((code[case.split] for case in cases), np.uint8, len(cases))
