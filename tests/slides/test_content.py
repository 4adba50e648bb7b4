import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from frugalpath.slides import content
from frugalpath.slides.content import Content, file_digests, file_keys, read_known, write_known


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; the path of its file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frugalpath" / "contents.sqlite"


@pytest.fixture
def files(tmp_path):
    made = []
    for i in range(5):
        path = tmp_path / f"patient-{i}.bin"
        path.write_bytes(bytes([i]) * (i + 1))
        made.append(str(path))
    return made


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_digests_are_those_of_the_bytes_and_each_file_is_read_once(files, monkeypatch):
    expected = {path: sha(path) for path in files}
    assert file_digests(files) == (expected, {})
    monkeypatch.setattr(content, "digest", lambda path: pytest.fail(f"{path} was read again"))
    assert file_digests([*files, files[0]]) == (expected, {})
    with pytest.raises(pytest.fail.Exception):
        file_digests(files, use_cache=False)


def test_large_files_are_read_at_three_places(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 1000)
    monkeypatch.setattr(content, "_PIECE", 10)
    data = bytearray(os.urandom(2000))
    path = tmp_path / "large"
    path.write_bytes(data)
    places = bytes(data[:10] + data[1000:1010] + data[-10:])
    assert content.digest(str(path)) == hashlib.sha256(b"2000" + places).hexdigest()


def test_files_that_cannot_be_read_are_named(files, tmp_path):
    (tmp_path / "empty").touch()
    absent, empty, zero = str(tmp_path / "absent"), str(tmp_path / "empty"), str(tmp_path / "\0")
    digests, problems = file_digests([absent, *files, empty, zero])
    assert set(digests) == set(files)
    assert problems[absent] == "cannot be read (No such file or directory)"
    assert problems[empty] == "cannot be read (the file is empty)"
    assert "null" in problems[zero]


@pytest.mark.parametrize("how", ["rewritten", "replaced", "replaced, same times", "link turned"])
def test_a_file_of_the_same_size_is_read_again(files, tmp_path, how):
    path, other = Path(files[1]), tmp_path / "other"
    other.write_bytes(b"ab")
    if how == "link turned":
        link = tmp_path / "link"
        link.symlink_to(path)
        path = link
    assert file_digests([str(path)])[0][str(path)] == sha(path)
    if how == "rewritten":
        path.write_bytes(b"ab")
    elif how == "link turned":
        path.unlink()
        path.symlink_to(other)
    else:
        if how.endswith("times"):
            now = path.stat()
            os.utime(other, ns=(now.st_atime_ns, now.st_mtime_ns))
        os.replace(other, path)
    assert file_digests([str(path)])[0][str(path)] == hashlib.sha256(b"ab").hexdigest()


def test_a_link_and_its_file_are_one(files, tmp_path):
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(files[0])
    through = str(tmp_path / "folder" / Path(files[0]).name)
    keys, _ = file_keys([files[0], through, str(tmp_path / "link")])
    assert len(set(keys.values())) == 1


def test_what_was_decoded_is_not_forgotten(files):
    keys, _ = file_keys(files[:2])
    first, second = keys.values()
    write_known({first: Content("ab" * 32, 4, 3), second: Content("cd" * 32)})
    write_known({first: Content("ab" * 32)})
    assert read_known(keys.values()) == {first: Content("ab" * 32, 4, 3), second: Content("cd" * 32)}
    assert read_known(keys.values(), decoded=True) == {first: Content("ab" * 32, 4, 3)}
    write_known({second: Content("cd" * 32, 2, 1)})
    assert read_known([second], decoded=True) == {second: Content("cd" * 32, 2, 1)}


def test_more_files_than_one_batch(files, monkeypatch):
    monkeypatch.setattr(content, "_BATCH", 2)
    expected = file_digests(files)
    monkeypatch.setattr(content, "digest", lambda path: pytest.fail(f"{path} was read again"))
    assert file_digests(files) == expected and len(expected[0]) == 5


def test_the_cache_holds_no_path(files, cache):
    file_digests(files)
    assert b"patient" not in cache.read_bytes()


@pytest.mark.parametrize("damage", ["text", "cut", "other table", "no folder"])
def test_a_damaged_cache_is_ignored_with_a_warning(files, cache, damage, caplog, monkeypatch, tmp_path):
    expected = file_digests(files)
    if damage == "text":
        cache.write_bytes(b"this is no database " * 500)
    elif damage == "cut":
        cache.write_bytes(cache.read_bytes()[:3000])
    elif damage == "other table":
        cache.unlink()
        with sqlite3.connect(cache) as made:
            made.execute("CREATE TABLE contents (other TEXT)")
        made.close()
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_digests(files) == expected
    assert "cache of checked files" in caplog.text


@pytest.mark.slow
def test_processes_may_write_at_once(files, cache):
    """Four processes that begin with no cache each add their own files; nothing is lost."""
    script = (
        "import sys; from frugalpath.slides.content import Content, write_known\n"
        "for i in range(5): write_known({bytes([int(sys.argv[1]), i] * 8): Content('ab' * 32)})"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(n)], stderr=subprocess.PIPE) for n in range(4)]
    assert [process.communicate()[1] for process in running] == [b""] * 4
    assert len(read_known(bytes([n, i] * 8) for n in range(4) for i in range(5))) == 20
