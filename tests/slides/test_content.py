from __future__ import annotations

import hashlib
import os
import sqlite3
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

import slides.content
from slides.content import FileFacts, cache_keys, digest, file_digests, remember, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/frugalpath/files.sqlite"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Paths whose content was read."""
    found: list[str] = []
    own = digest
    monkeypatch.setattr(slides.content, "digest", lambda path: found.append(path) or own(path))
    return found


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_digests_are_those_of_the_content(tmp_path):
    paths = [write(tmp_path / f"{i}", bytes([i % 3]) * 10) for i in range(5)]
    found, problems = file_digests([*paths, paths[0]])
    assert not problems and list(found) == paths
    assert all(found[p] == hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths)


def test_a_known_file_is_not_read_again(tmp_path, reads):
    path = write(tmp_path / "a", b"one")
    first = file_digests([path])
    assert file_digests([path]) == first and reads == [path]
    os.symlink(path, tmp_path / "link")
    assert file_digests([str(tmp_path / "link")])[0] == {str(tmp_path / "link"): first[0][path]}
    assert reads == [path], "the same file by another name"


@pytest.mark.parametrize("change", ["size", "time", "file", "link"])
def test_a_changed_file_is_read_again(tmp_path, reads, change):
    path, other = write(tmp_path / "a", b"one"), write(tmp_path / "b", b"two")
    asked = path
    if change == "link":
        asked = str(tmp_path / "link")
        os.symlink(path, asked)
    before = file_digests([asked])[0][asked]
    if change == "size":
        Path(path).write_bytes(b"three")
    elif change == "time":
        stat = os.stat(path)
        Path(path).write_bytes(b"two")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "file":
        os.utime(other, ns=(0, os.stat(path).st_mtime_ns + 5))
        os.replace(other, path)
    else:
        os.remove(asked)
        os.symlink(other, asked)
        os.utime(other, ns=(0, os.stat(path).st_mtime_ns))
    after = file_digests([asked])[0][asked]
    assert after == hashlib.sha256(Path(asked).read_bytes()).hexdigest() != before


def test_what_is_wrong_is_told_of_each_file(tmp_path):
    good, empty = write(tmp_path / "good", b"x"), write(tmp_path / "empty", b"")
    found, problems = file_digests([str(tmp_path / "absent"), good, empty, str(tmp_path)])
    assert list(found) == [good]
    assert problems[str(tmp_path / "absent")] == "cannot be read (No such file or directory)"
    assert problems[empty] == "cannot be read (the file is empty)"
    assert "directory" in problems[str(tmp_path)]


def test_large_files_are_hashed_at_three_places(tmp_path, monkeypatch):
    monkeypatch.setattr(slides.content, "_WHOLE", 1000)
    monkeypatch.setattr(slides.content, "_PIECE", 10)
    content = bytearray(os.urandom(5000))
    path = write(tmp_path / "a", content)
    expected = hashlib.sha256(b"5000" + content[:10] + content[2500:2510] + content[-10:]).hexdigest()
    assert digest(path) == expected


def test_the_size_of_an_image_is_kept_when_its_digest_is_asked_for(tmp_path):
    path = write(tmp_path / "a", b"one")
    (key,) = cache_keys([path])[0].values()
    remember({key: FileFacts(digest(path), 30, 20)})
    remember({key: FileFacts(digest(path))})
    assert remembered([key])[key] == FileFacts(digest(path), 30, 20)


def test_a_cache_that_cannot_be_read_is_told_and_done_without(tmp_path, cache, caplog, reads):
    path = write(tmp_path / "a", b"one")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"no database, whatever it is called" * 100)
    assert file_digests([path])[0][path] == hashlib.sha256(b"one").hexdigest()
    assert "no cache of checked files" in caplog.text and "could not be written" in caplog.text


def test_no_path_stands_in_the_cache(tmp_path, cache):
    file_digests([write(tmp_path / "SMITH^JOHN", b"one")])
    with sqlite3.connect(cache) as connection:
        (row,) = connection.execute("SELECT * FROM contents").fetchall()
    assert "SMITH" not in str(row)
    assert b"SMITH" not in cache.read_bytes()


def fill(paths: list[str]) -> dict[str, str]:
    return file_digests(paths)[0]


def test_two_processes_fill_it_at_once(tmp_path):
    paths = [write(tmp_path / f"{i}", str(i).encode()) for i in range(300)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        first, second = pool.map(fill, [paths, paths])
    assert first == second and len(first) == 300
    keys = cache_keys(paths)[0]
    known = remembered(keys.values())
    assert {path: known[key].digest for path, key in keys.items()} == first
