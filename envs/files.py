"""Facts about the files behind cases: do they open, how large are they, which are copies of one another."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from slides.content import FileFacts, cache_keys, digest, remember, remembered
from slides.images import MAX_PIXELS, OR_DROP, ImageError, allow_pixels, open_image, slide_format, too_large


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


def inspect_files(
    images: Iterable[str],
    slides: Iterable[str] = (),
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int = 8,
    use_cache: bool = True,
) -> tuple[dict[str, FileFacts], dict[str, str]]:
    """Decode every image once (a truncated file shows only then) and hash every file.

    Results are remembered in the user's cache folder by path, size and time of change, so that the next start only
    looks at new files. Slides are hashed, not opened: a broken slide must not stop a run over thousands of them.

    Args:
        images: paths of fields of view.
        slides: paths of slides and feature files.
        max_pixels: larger images are refused before they are decoded (decompression bombs); up to so many pixels they
            may then be opened by all of this process.
        workers: threads.
        use_cache: read and write the cache.

    Returns:
        facts by path, and by path what is wrong with the files that cannot be used.
    """
    allow_pixels(max_pixels)
    kinds = dict.fromkeys(slides, False) | dict.fromkeys(images, True)
    facts: dict[str, FileFacts] = {}
    keys, problems = cache_keys(kinds)
    known = remembered(keys.values()) if use_cache else {}
    todo = []
    for path, key in keys.items():
        if key in known and (known[key].width or not kinds[path]):
            facts[path] = known[key] if kinds[path] else FileFacts(known[key].digest)
        else:
            todo.append(path)

    def look(path: str) -> FileFacts | str:
        try:
            return _look(path, kinds[path], max_pixels)
        except ImageError as error:
            return str(error)
        except Exception as error:  # decoders raise almost anything on broken bytes; each becomes a named problem
            return f"cannot be decoded ({error}); replace the file{OR_DROP}"

    fresh: dict[str, FileFacts] = {}
    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(
            pool.map(look, todo),
            total=len(todo),
            desc="check files",
            unit="file",
            disable=len(todo) < 200,
            leave=False,
        )
        for path, result in zip(todo, found, strict=True):
            if isinstance(result, FileFacts):
                facts[path] = fresh[keys[path]] = result
            else:
                problems[path] = result
    if use_cache and fresh:
        remember(fresh)
    for path, fact in list(facts.items()):
        if fact.width * fact.height > max_pixels:
            problems[path] = str(too_large(fact.width, fact.height, max_pixels))
            del facts[path]
    return facts, problems


def _look(path: str, is_image: bool, max_pixels: int) -> FileFacts | str:
    found = digest(path)
    if not is_image:
        return FileFacts(found)
    if slide := slide_format(path):
        return f"is a whole slide ({slide}), whose first picture may be that of its label; give it under `slides`"
    with open_image(path, max_pixels) as image:
        width, height = image.size
        # An eighth of the size still reads the whole JPEG stream, at a fraction of the time.
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
    return FileFacts(found, width, height)
