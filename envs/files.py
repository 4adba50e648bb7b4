"""Inspect the files of cases: whether they open, their size, and which are copies."""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from frugalpath.slides.content import (
    Content,
    digest,
    file_key,
    file_keys,
    in_processes,
    numbers_below,
    read_known,
    without_collections,
    write_known,
)
from frugalpath.slides.images import (
    FORMATS,
    MAX_PIXELS,
    OR_DROP,
    ImageError,
    allow_pixels,
    open_image,
    plain_picture,
    slide_format,
    too_large,
)
from frugalpath.slides.plain import plain_size

_SMALL = 2**20  # bytes of a file up to which it is held in memory, to be hashed and decoded after one reading
_HEADS = {b"\x89PNG\r\n\x1a\n": ("PNG",), b"\xff\xd8\xff": ("JPEG",)}
_MANY = 4000  # files from which on processes are worth their start
_BLOCK = 500  # files that one of them looks at in a row
_AHEAD = 400  # blocks that may wait to be taken, so that processes go on while this one writes
_WRITE_S = 30  # seconds after which what was found is remembered, in case the rest is not reached


class FileFacts(NamedTuple):
    """Facts about one file: content hash, and width and height in pixels (0 for slides)."""

    digest: str
    width: int = 0
    height: int = 0


class AbsentFile(ValueError):
    """There is no such file; `path` is where it should be."""

    def __init__(self, path: Path, message: str):
        self.path = path
        super().__init__(message)


def resolve_path(text: str, root: Path, *, allow_outside: bool = False) -> Path:
    """Absolute path of a manifest's entry, links followed; relative entries start from `root`.

    Raises:
        ValueError: it leaves `root` and `allow_outside` is off.
        AbsentFile: there is no such file.
    """
    if "\0" in text or not text.strip():
        raise ValueError(f"{text[:80]!r} is not a path")
    try:
        root = root.resolve()
        path = (root / text).resolve()
        there = path.is_file()
    except (OSError, RuntimeError, UnicodeError) as error:  # too long, a ring of links, or not to be written as bytes
        raise ValueError(f"{text[:80]!r} is not a path ({error}); correct it") from None
    if not allow_outside and not path.is_relative_to(root):
        raise ValueError(f"{text!r} leads outside {root}; move the file, or set allow_outside: true if you trust it")
    if not there:
        remedy = "correct the path, or set root to the folder it starts from"
        raise AbsentFile(path, f"no file {text!r} under {root}; {remedy}")
    return path


class FoundFiles:
    """Look up all files of a manifest together: folders are resolved once, the rest runs in processes.

    Attributes:
        paths: what `resolve_path` gives for an entry. Before `finish` it has entries that are links, or not there.
    """

    def __init__(self, entries: Iterable[str], root: Path, *, allow_outside: bool = False):
        """Begin to look.

        Args:
            entries: paths as the rows have them.
            root: folder that relative ones start from.
            allow_outside: let them leave it.
        """
        self._entries = list(dict.fromkeys(entries))
        self._root, self._allow_outside = root, allow_outside
        self.paths: dict[str, str] = {}
        self._numbers = np.empty((0, 3), np.int64)
        self._odd: dict[str, bytes] = {}
        start = os.path.realpath(str(root).replace("\0", "?"))
        size = 20 * _BLOCK
        tasks = [(start, self._entries[at : at + size]) for at in range(0, len(self._entries), size)]
        self._coming = in_processes(numbers_below, tasks, many=len(self._entries) > _MANY, ahead=len(tasks))
        texts = dict.fromkeys(entry.rpartition("/")[0] for entry in self._entries)
        folders = {folder: self._real_folder(start, folder) for folder in texts}
        self._folders = list(folders.values())
        plain = start.rstrip("/") + "/"
        if all(real == f"{plain}{folder}/" for folder, real in folders.items()):
            self.paths = dict(zip(self._entries, map(plain.__add__, self._entries), strict=True))
            return
        for entry in self._entries:
            folder, slash, name = entry.rpartition("/")
            # The second: directly under "/", or blank.
            if (real := folders[folder]) is not None and (folder or (not slash and name.strip())):
                self.paths[entry] = real + name

    def _real_folder(self, start: str, folder: str) -> str | None:
        """Without links, with a slash at the end; None where its files are for `resolve_path`."""
        try:
            real = os.path.realpath(os.path.join(start, folder))
        except (OSError, ValueError):
            return None
        inside = self._allow_outside or Path(real).is_relative_to(start)
        return real.rstrip("/") + "/" if inside and os.sep == "/" else None

    def finish(self) -> bool:
        """Wait for the end; whether `paths` had all entries right before it."""
        self._numbers = np.frombuffer(bytearray().join(self._coming), np.int64).reshape(-1, 3)
        odd = {self._entries[i] for i in np.flatnonzero(self._numbers[:, 0] < 0)}
        if len(self.paths) < len(self._entries):
            odd.update(entry for entry in self._entries if entry not in self.paths)
        for entry in (entry for entry in self._entries if entry in odd) if odd else ():
            self.paths.pop(entry, None)
            with suppress(ValueError):
                self.paths[entry] = path = str(resolve_path(entry, self._root, allow_outside=self._allow_outside))
                self._odd |= file_keys([path])[0]
        return not odd

    def keys(self) -> dict[str, bytes]:
        """Under what the cache knows each of the files (`frugalpath.slides.content.file_keys`), by path."""
        known = {
            path: file_key(path, *numbers)
            for entry, numbers in zip(self._entries, self._numbers.tolist(), strict=True)
            if (path := self.paths.get(entry)) is not None
        }
        return known | self._odd

    def digest(self) -> str:
        """Hash of where the files are, of their sizes and times: another one where one has changed, come or gone."""
        state = hashlib.sha256(self._numbers.tobytes())
        odd = [f"{path}={key.hex()}" for path, key in self._odd.items()]
        state.update("\0".join([*map(str, self._folders), *odd]).encode("utf-8", "surrogateescape"))
        return state.hexdigest()


def inspect_files(
    images: Iterable[str],
    slides: Iterable[str] = (),
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int = 8,
    use_cache: bool = True,
    keys: Mapping[str, bytes] | None = None,
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Decode every image once (a truncated file shows only then) and hash every file.

    Results are remembered (`slides.content`), so that the next start only looks at new files. Slides are hashed, not
    opened: a broken slide must not stop a run over thousands of them.

    Args:
        images: paths of fields of view.
        slides: paths of slides and feature files.
        max_pixels: larger images are refused before they are decoded (decompression bombs); up to so many pixels they
            may then be opened by all of this process.
        workers: threads; thousands of files are shared out over processes, one a core.
        use_cache: read and write the cache.
        keys: what `FoundFiles` knows for some of the paths, to spare looking at them again.

    Returns:
        facts by path, and by path what is wrong with the files that cannot be used.
    """
    allow_pixels(max_pixels)
    kinds = dict.fromkeys(slides, False) | dict.fromkeys(images, True)
    known_keys = keys or {}
    more, problems = file_keys(path for path in kinds if path not in known_keys)
    keys = {**known_keys, **more} if more else known_keys
    facts: dict[str, FileFacts] = {}
    if use_cache:
        for decoded in (False, True):
            asked = {path: keys[path] for path, kind in kinds.items() if kind is decoded and path not in problems}
            known = read_known(asked.values(), decoded=decoded)
            for path, key in asked.items():
                if (content := known.get(key)) is not None:
                    facts[path] = FileFacts(content.digest, *((content.width, content.height) if decoded else ()))
    todo = [path for path in kinds if path not in facts and path not in problems]
    fresh: dict[bytes, Content] = {}
    written = time.monotonic()
    with tqdm(total=len(todo), desc="check files", unit="file", disable=len(todo) < 200, leave=False) as progress:
        for part, results in _look_at_all(todo, kinds, max_pixels, workers):
            progress.update(len(part))
            for path, result in zip(part, results, strict=True):
                if isinstance(result, str):
                    problems[path] = result
                    continue
                facts[path] = FileFacts(*result)
                fresh[keys[path]] = Content(*(result if kinds[path] else result[:1]))
            if use_cache and time.monotonic() > written + _WRITE_S:
                write_known(fresh)
                fresh, written = {}, time.monotonic()
    if use_cache:
        write_known(fresh)
    for path, fact in list(facts.items()):
        if fact.width * fact.height > max_pixels:
            problems[path] = str(too_large(fact.width, fact.height, max_pixels))
            del facts[path]
    return facts, problems


def _look_at_all(
    paths: Sequence[str], kinds: Mapping[str, bool], max_pixels: int, workers: int
) -> Iterator[tuple[Sequence[str], list[tuple[str, int, int] | str]]]:
    """Blocks of paths with what `_try_to_look` says of each."""
    size = _BLOCK if len(paths) >= _MANY else 4 * workers
    parts = [paths[at : at + size] for at in range(0, len(paths), size)]
    tasks = [(part, [kinds[path] for path in part], max_pixels) for part in parts]
    if len(paths) >= _MANY:
        yield from zip(parts, in_processes(_look_at_block, tasks, ahead=_AHEAD), strict=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda path: _try_to_look(path, kinds[path], max_pixels), paths)
        for part in parts:
            yield part, [next(found) for _ in part]


def _look_at_block(paths: Sequence[str], kinds: Sequence[bool], max_pixels: int) -> list[tuple[str, int, int] | str]:
    """In another process."""
    allow_pixels(max_pixels)
    with without_collections():
        return [_try_to_look(path, kind, max_pixels) for path, kind in zip(paths, kinds, strict=True)]


def _try_to_look(path: str, is_image: bool, max_pixels: int) -> tuple[str, int, int] | str:
    """Digest, width and height, or what is wrong; tuples are handed over faster than objects."""
    try:
        found = _look(path, is_image, max_pixels)
        return found if isinstance(found, str) else (found.digest, found.width, found.height)
    except ImageError as error:
        return str(error)
    except Exception as error:  # decoders raise almost anything on broken bytes; each becomes a named problem
        return f"cannot be decoded ({error}); replace the file{OR_DROP}"


def _look(path: str, is_image: bool, max_pixels: int) -> FileFacts | str:
    if not is_image:
        return FileFacts(digest(path))
    data = _small_content(path)
    if data and plain_picture(path, data):
        if size := plain_size(data, max_pixels):
            return FileFacts(hashlib.sha256(data).hexdigest(), *size)
        try:
            formats = next((known for head, known in _HEADS.items() if data.startswith(head)), FORMATS)
            return FileFacts(hashlib.sha256(data).hexdigest(), *_decode(io.BytesIO(data), max_pixels, formats))
        except Exception:  # told below, by the name of the file
            pass
    checked = digest(path)
    if slide := slide_format(path):
        return f"is a whole slide ({slide}), whose first picture may be that of its label; give it under `slides`"
    return FileFacts(checked, *_decode(path, max_pixels))


def _small_content(path: str) -> bytes:
    """All of a small file, else nothing; calls of the system's take a fifth of the time that a file object does."""
    try:
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError:
        return b""  # told by whoever opens it next
    try:
        size = os.fstat(opened).st_size
        data = os.read(opened, size) if size <= _SMALL else b""
        return data if len(data) == size else b""
    except OSError:
        return b""
    finally:
        os.close(opened)


def _decode(source: str | BinaryIO, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> tuple[int, int]:
    """Width and height of an image that can be decoded."""
    with open_image(source, max_pixels, formats) as image:
        width, height = image.size
        # An eighth of the size still reads the whole JPEG stream, at a fraction of the time.
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return width, height
