"""Facts about the files behind cases: do they open, how large are they, which are copies of one another."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from slides.content import NO_KEY, Content, digest, file_keys, in_processes, keys_below, read_known, write_known
from slides.images import (
    MAX_PIXELS,
    OR_DROP,
    ImageError,
    allow_pixels,
    open_image,
    plain_picture,
    slide_format,
    too_large,
)

_SMALL = 2**20  # bytes of a file up to which it is held in memory, to be hashed and decoded after one reading
_MANY = 4000  # files from which on processes are worth their start
_BLOCK = 500  # files that one of them looks at in a row


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What was found out about one file: content hash, and width and height in pixels (0 for slides)."""

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
        ValueError: it leaves `root` and `allow_outside` is off; says so in one sentence.
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


def find_files(
    texts: Iterable[str], root: Path, *, allow_outside: bool = False
) -> tuple[dict[str, str], dict[str, bytes]]:
    """What `resolve_path` gives, for many entries at once; folders are resolved once.

    Returns:
        the path of each entry, and under what the cache knows each path (`slides.content.file_keys`). Entries that
        are links, or of which something is to be told, are left out: ask `resolve_path` for them.
    """
    if os.sep != "/":
        return {}, {}
    unique = list(dict.fromkeys(texts))
    try:
        start = str(root.resolve())
    except (OSError, RuntimeError):
        return {}, {}
    size = 20 * _BLOCK
    parts = [unique[at : at + size] for at in range(0, len(unique), size)]
    found = in_processes(keys_below, [(start, part) for part in parts], many=len(unique) > _MANY)
    folders: dict[str, str | None] = {}
    paths: dict[str, str] = {}
    keys: dict[str, bytes] = {}
    for part, block in zip(parts, found, strict=True):
        for at, text in enumerate(part):
            key = block[16 * at : 16 * at + 16]
            if key == NO_KEY or not text.strip():
                continue
            folder, _, name = os.path.join(start, text).rpartition("/")
            if folder not in folders:
                real = os.path.realpath(folder or "/")
                inside = allow_outside or Path(real).is_relative_to(start)
                folders[folder] = real.rstrip("/") + "/" if inside else None
            if (real_folder := folders[folder]) is not None:
                paths[text] = path = real_folder + name
                keys[path] = key
    return paths, keys


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
        keys: what `find_files` gave for some of the paths, to spare looking at them again.

    Returns:
        facts by path, and by path what is wrong with the files that cannot be used.
    """
    allow_pixels(max_pixels)
    kinds = dict.fromkeys(slides, False) | dict.fromkeys(images, True)
    keys = keys or {}
    more, problems = file_keys(path for path in kinds if path not in keys)
    facts: dict[str, FileFacts] = {}
    if use_cache:
        for decoded in (False, True):
            asked = {
                path: more.get(path) or keys[path]
                for path, kind in kinds.items()
                if kind is decoded and path not in problems
            }
            known = read_known(asked.values(), decoded=decoded)
            for path, key in asked.items():
                if (content := known.get(key)) is not None:
                    facts[path] = FileFacts(content.digest, *((content.width, content.height) if decoded else ()))
    todo = [path for path in kinds if path not in facts and path not in problems]
    progress = tqdm(total=len(todo), desc="check files", unit="file", disable=len(todo) < 200, leave=False)
    fresh: dict[bytes, Content] = {}
    with progress:
        for path, result in zip(todo, _look_at_all(todo, kinds, max_pixels, workers), strict=True):
            progress.update()
            if isinstance(result, str):
                problems[path] = result
                continue
            facts[path] = result
            size = (result.width, result.height) if kinds[path] else (None, None)
            fresh[more.get(path) or keys[path]] = Content(result.digest, *size)
            if use_cache and len(fresh) >= 20_000:
                write_known(fresh)
                fresh = {}
    if use_cache:
        write_known(fresh)
    for path, fact in list(facts.items()):
        if fact.width * fact.height > max_pixels:
            problems[path] = str(too_large(fact.width, fact.height, max_pixels))
            del facts[path]
    return facts, problems


def _look_at_all(
    paths: Sequence[str], kinds: Mapping[str, bool], max_pixels: int, workers: int
) -> Iterator[FileFacts | str]:
    if len(paths) < _MANY:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(lambda path: _try_to_look(path, kinds[path], max_pixels), paths)
        return
    parts = [paths[at : at + _BLOCK] for at in range(0, len(paths), _BLOCK)]
    tasks = [(part, [kinds[path] for path in part], max_pixels) for part in parts]
    for results in in_processes(_look_at_block, tasks):
        for result in results:
            yield result if isinstance(result, str) else FileFacts(*result)


def _look_at_block(paths: Sequence[str], kinds: Sequence[bool], max_pixels: int) -> list[tuple[str, int, int] | str]:
    """In another process; tuples are sent faster than objects."""
    allow_pixels(max_pixels)
    found = (_try_to_look(path, kind, max_pixels) for path, kind in zip(paths, kinds, strict=True))
    return [each if isinstance(each, str) else (each.digest, each.width, each.height) for each in found]


def _try_to_look(path: str, is_image: bool, max_pixels: int) -> FileFacts | str:
    try:
        return _look(path, is_image, max_pixels)
    except ImageError as error:
        return str(error)
    except Exception as error:  # decoders raise almost anything on broken bytes; each becomes a named problem
        return f"cannot be decoded ({error}); replace the file{OR_DROP}"


def _look(path: str, is_image: bool, max_pixels: int) -> FileFacts | str:
    if not is_image:
        return FileFacts(digest(path))
    with open(path, "rb", buffering=0) as file:
        data = file.read(_SMALL + 1)
    if 0 < len(data) <= _SMALL and plain_picture(path, data):
        try:
            return FileFacts(hashlib.sha256(data).hexdigest(), *_decode(io.BytesIO(data), max_pixels))
        except Exception:  # told below, by the name of the file
            pass
    checked = digest(path)
    if slide := slide_format(path):
        return f"is a whole slide ({slide}), whose first picture may be that of its label; give it under `slides`"
    return FileFacts(checked, *_decode(path, max_pixels))


def _decode(source: str | BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Width and height of an image that can be decoded."""
    with open_image(source, max_pixels) as image:
        width, height = image.size
        # An eighth of the size still reads the whole JPEG stream, at a fraction of the time.
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return width, height
