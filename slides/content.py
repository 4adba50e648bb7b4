"""Digests of files, computed once and cached until a file changes.

The cache is one SQLite file in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`), which processes may share.
It knows a file by a hash of its real path, size and times, since a path may hold a patient's number.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import sqlite3
import stat
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from loky import ProcessPoolExecutor, cpu_count

logger = logging.getLogger(__name__)

WHOLE = 64 * 2**20
"""Files up to this size are hashed completely, larger ones (slides) at three places."""
_PIECE = 2**20
_THREADS = 8
_PROCESSES = 16
_ODD = (-1, -1, -1)
_BATCH = 5000  # files that one query or one transaction is about; SQLite takes 32,766 in a query


class Content(NamedTuple):
    """Facts about a file: SHA-256 (hex), and width and height in px once it was decoded as an image."""

    digest: str
    width: int | None = None
    height: int | None = None


class RealPaths:
    """Real paths of many files: their folders are resolved once, links among the files are followed one by one."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: str) -> tuple[str, os.stat_result]:
        """The path without links, and the status of the file there.

        Raises:
            OSError: there is no such file, or it cannot be looked at.
        """
        status = os.lstat(path)
        folder, name = os.path.split(path)
        if stat.S_ISLNK(status.st_mode) or name in ("", ".", ".."):
            return os.path.realpath(path), os.stat(path)
        real = self._folders.get(folder)
        if real is None:
            real = self._folders[folder] = os.path.realpath(folder)
        return os.path.join(real, name), status


def file_digests(
    paths: Sequence[str], *, workers: int | None = None, use_cache: bool = True
) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of files; those that the cache knows are not read.

    Args:
        paths: files of any kind.
        workers: number of reading threads.
        use_cache: look digests up in the cache, and add new ones.

    Returns:
        SHA-256 (hex) by path, see `digest`, and by path what is wrong with the files that cannot be read.
    """
    keys, problems = file_keys(paths)
    known = read_known(keys.values()) if use_cache else {}
    digests = {path: known[key].digest for path, key in keys.items() if key in known}
    todo = [path for path in keys if path not in digests]

    def look(path: str) -> str | OSError:
        try:
            return digest(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(workers or _THREADS) as pool:
        for start in range(0, len(todo), _BATCH):
            part = todo[start : start + _BATCH]
            fresh = {}
            for path, found in zip(part, pool.map(look, part), strict=True):
                if isinstance(found, str):
                    digests[path] = found
                    fresh[keys[path]] = Content(found)
                else:
                    problems[path] = f"cannot be read ({found.strerror or found})"
            if use_cache:
                write_known(fresh)
    return digests, problems


def digest(path: str) -> str:
    """SHA-256 of the content; of size, head, middle and tail for files over 64 MB.

    Raises:
        OSError: the file is empty or cannot be read.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise OSError("the file is empty")
    with open(path, "rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        state = hashlib.sha256(str(size).encode())
        for start in (0, size // 2, size - _PIECE):
            file.seek(start)
            state.update(file.read(_PIECE))
        return state.hexdigest()


def file_keys(paths: Iterable[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Under what the cache knows each file as it is now, and by path what is wrong with those not to be looked at."""
    real_path = RealPaths()
    keys: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    for path in paths:
        if path in keys:
            continue
        try:
            real, now = real_path(path)
        except (OSError, ValueError) as error:  # ValueError: a zero byte
            problems[path] = f"cannot be read ({getattr(error, 'strerror', error)})"
            continue
        keys[path] = file_key(real, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    return keys, problems


def numbers_below(root: str, entries: Sequence[str]) -> bytes:
    """Size and times of regular files, three int64 each, one after another; -1 for links and all else.

    Args:
        root: folder that relative entries start from.
        entries: paths.
    """
    numbers = array("q")
    start = root.rstrip("/") + "/"
    for entry in entries:
        try:
            now = os.lstat(entry if entry.startswith("/") else start + entry)
        except (OSError, ValueError):
            numbers.extend(_ODD)
            continue
        regular = stat.S_ISREG(now.st_mode)
        numbers.extend((now.st_size, now.st_mtime_ns, now.st_ctime_ns) if regular else _ODD)
    return numbers.tobytes()


def file_key(real: str, size: int, written: int, changed: int) -> bytes:
    """Under what the cache knows a file of this real path, size and times (ns)."""
    # The time of change tells of a file put in place of another with the same size and time of writing.
    text = f"{real}\0{size}\0{written}\0{changed}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def usable_cores() -> int:
    """Cores that this process may use, of those that the launcher's processes on this machine share."""
    return max(1, cpu_count() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def in_processes(
    work: Callable[..., Any], tasks: Sequence[tuple], *, many: bool = True, ahead: int | None = None
) -> Iterator[Any]:
    """`work(*task)` of each task, in their order, over as many processes as this one has cores.

    They start at once, and go on while the caller does something else.

    Args:
        work: a function that another process can import.
        tasks: its arguments.
        many: whether there is enough to do for processes to be worth their start.
        ahead: tasks that are begun before the result of the first is taken; 8 a process by default.

    Raises:
        RuntimeError: when results are taken: a process died.
    """
    number = min(_PROCESSES, usable_cores(), len(tasks))
    if number < 2 or not many:
        return (work(*task) for task in tasks)
    # Loky's way to start a process neither forks one in which torch has started threads nor imports the script again.
    pool = ProcessPoolExecutor(number)
    left = iter(tasks)
    waiting = deque(pool.submit(work, *task) for task in islice(left, ahead or 8 * number))

    def results() -> Iterator[Any]:
        with pool:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, *task) for task in islice(left, 1))
                yield result

    return results()


@contextmanager
def without_collections() -> Iterator[None]:
    """For making millions of objects that stay: to look for unused ones again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_known(keys: Iterable[bytes], *, decoded: bool = False) -> dict[bytes, Content]:
    """What the cache knows of files, by the keys of `file_keys`.

    Args:
        decoded: leave out files that have only been hashed.
    """
    found: dict[bytes, Content] = {}
    condition = " AND width IS NOT NULL" if decoded else ""
    try:
        with closing(open_cache()) as cache:
            if cache.execute("SELECT 1 FROM contents LIMIT 1").fetchone() is None:
                return found
            wanted = sorted(keys)
            for start in range(0, len(wanted), _BATCH):
                part = wanted[start : start + _BATCH]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, digest, width, height FROM contents WHERE key IN ({marks}){condition}"
                for key, content, width, height in cache.execute(query, part):
                    if isinstance(content, bytes) and len(content) == hashlib.sha256().digest_size:
                        found[key] = Content(content.hex(), width, height)
    except (OSError, sqlite3.Error) as error:
        logger.warning("no cache of checked files (%s); every file is checked again", error)
        return {}
    return found


def write_known(contents: Mapping[bytes, Content]) -> None:
    """Remember files by the keys of `file_keys`; what has been decoded is not forgotten when it is hashed again."""
    if not contents:
        return
    rows = [(key, bytes.fromhex(c.digest), c.width, c.height) for key, c in sorted(contents.items())]
    try:
        with closing(open_cache()) as cache, cache:
            cache.executemany(
                "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", [r for r in rows if r[2] is not None]
            )
            cache.executemany("INSERT OR IGNORE INTO contents VALUES (?, ?, ?, ?)", [r for r in rows if r[2] is None])
    except (OSError, sqlite3.Error) as error:
        logger.warning("the cache of checked files could not be written (%s)", error)


def open_cache() -> sqlite3.Connection:
    """The cache, made where there is none yet.

    Raises:
        OSError, sqlite3.Error: it cannot be made or opened, or is damaged.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    connection = sqlite3.connect(folder / "contents.sqlite", timeout=60)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS contents "
            "(key BLOB PRIMARY KEY, digest BLOB, width INTEGER, height INTEGER) WITHOUT ROWID"
        )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def cache_folder() -> Path:
    """Where this package keeps what it can find out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frugalpath"
