"""What files hold, found out once: a digest of the content by path, size and time of change, remembered on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_WHOLE = 64 * 2**20  # files up to this size are hashed whole, larger ones (slides) at three places
_PIECE = 2**20
_ASKED = 500  # keys of one question to the cache: SQLite takes 999 at least


@dataclass(frozen=True)
class FileFacts:
    """What was found out about one file: content hash, and width and height in pixels (0 where it was not decoded)."""

    digest: str
    width: int = 0
    height: int = 0


def file_digests(paths: Sequence[str], *, workers: int = 8) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of files, in hex: of the content up to 64 MB, of size, head, middle and tail above.

    A file whose path, size and time of change are known is not read again.

    Returns:
        digests by path, and by path what is wrong with files that cannot be read; the sentence reads on from the path.
    """
    keys, problems = cache_keys(paths)
    known = remembered(keys.values())
    digests = {path: known[key].digest for path, key in keys.items() if key in known}
    todo = [path for path in keys if path not in digests]
    fresh = {}
    with ThreadPoolExecutor(workers) as pool:
        for path, found in zip(todo, pool.map(_tried, todo), strict=True):
            if isinstance(found, OSError):
                problems[path] = f"cannot be read ({found.strerror or found})"
            else:
                digests[path] = found
                fresh[keys[path]] = FileFacts(found)
    remember(fresh)
    return digests, problems


def digest(path: str) -> str:
    """SHA-256 of a file's content; of size, head, middle and tail for files over 64 MB.

    Raises:
        OSError: it cannot be read, or is empty.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise OSError("the file is empty")
    with open(path, "rb") as file:
        if size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        state = hashlib.sha256(str(size).encode())
        for start in (0, size // 2, size - _PIECE):
            file.seek(start)
            state.update(file.read(_PIECE))
        return state.hexdigest()


def cache_keys(paths: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the cache by path, and by path why files are not there.

    A name changes with path, size and time of change. It is a hash: a path may hold a patient's number, and the cache
    is a file of its own.
    """
    keys, problems = {}, {}
    for path in dict.fromkeys(paths):
        try:
            stat = os.stat(path)
        except OSError as error:
            problems[path] = f"cannot be read ({error.strerror})"
            continue
        text = f"{os.path.realpath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}"
        keys[path] = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    return keys, problems


def remembered(keys: Iterable[str]) -> dict[str, FileFacts]:
    """What the cache has of the keys; nothing, with a warning, where there is none to be read."""
    found: dict[str, FileFacts] = {}
    names = list(dict.fromkeys(keys))
    try:
        with closing(_open()) as cache:
            for start in range(0, len(names), _ASKED):
                some = names[start : start + _ASKED]
                marks = ", ".join("?" * len(some))
                rows = cache.execute(f"SELECT key, digest, width, height FROM contents WHERE key IN ({marks})", some)
                found |= {key: FileFacts(*facts) for key, *facts in rows}
    except (OSError, sqlite3.Error) as error:
        logger.warning("no cache of checked files (%s); every file is checked again", error)
    return found


def remember(facts: Mapping[str, FileFacts]) -> None:
    """Add to the cache, which any number of processes may do at once; the size of an image that is known stays."""
    if not facts:
        return
    try:
        with closing(_open()) as cache, cache:
            cache.executemany(
                "INSERT INTO contents VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET digest = excluded.digest, "
                "width = max(width, excluded.width), height = max(height, excluded.height)",
                [(key, fact.digest, fact.width, fact.height) for key, fact in facts.items()],
            )
    except (OSError, sqlite3.Error) as error:
        logger.warning("the cache of checked files could not be written (%s)", error)


def _open() -> sqlite3.Connection:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frugalpath"
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "files.sqlite", timeout=60)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS contents (key TEXT PRIMARY KEY, digest TEXT, width INTEGER, height INTEGER) "
        "WITHOUT ROWID"
    )
    return connection


def _tried(path: str) -> str | OSError:
    try:
        return digest(path)
    except OSError as error:
        return error
