from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from frugalpath.errors import InputError
from frugalpath.slides.field_store import FieldStore, StoredField, count_stored, load_stored
from frugalpath.slides.store import write_features

DIM = 5
ROOT = Path(__file__).resolve().parents[2]


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def cells_of(number: int) -> np.ndarray:
    """A map of a size and of values of its own."""
    shape = (1 + number % 3, 2 + number % 2, DIM)
    return np.random.default_rng(number).normal(size=shape).astype(np.float16)


def open_store(folder: Path) -> FieldStore:
    return FieldStore(folder, "abcd1234", stride=16, encoder="mean", fingerprint="mean@1")


def fill(folder: Path, numbers) -> FieldStore:
    with open_store(folder) as store:
        for number in numbers:
            store.add(key_of(number), cells_of(number))
    return store


def holds(store: FieldStore, number: int) -> bool:
    stored = store.read(key_of(number))
    return np.array_equal(stored.features, cells_of(number).reshape(-1, DIM).astype(np.float32))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_what_is_added_is_read(tmp_path):
    store = fill(tmp_path, range(20))
    assert len(shards(tmp_path)) == 1 and len(store) == 20
    for number in range(20):
        assert holds(store, number)
        rows, columns, _ = cells_of(number).shape
        assert store.count(key_of(number)) == rows * columns
        assert store.dim(key_of(number)) == store.read(key_of(number)).features.shape[1]
    stored = store.read(key_of(1))
    assert stored.coords.tolist() == [[0, 0], [16, 0], [32, 0], [0, 16], [16, 16], [32, 16]]
    known = {"encoder": "mean", "fingerprint": "mean@1", "patch_size": 16, "width": 48, "height": 32}
    assert stored.attrs == known
    assert store.missing([key_of(n) for n in (3, 99, 19, 100)]) == [key_of(99), key_of(100)]
    with pytest.raises(InputError, match="no features of this image"):
        store.read(key_of(99))


def test_the_library_reads_a_shard(tmp_path):
    fill(tmp_path, range(3))
    with safe_open(shards(tmp_path)[0], "numpy") as shard:
        assert shard.metadata()["fingerprint"] == "mean@1"
        assert shard.get_tensor("keys").tobytes().hex() == "".join(key_of(n) for n in range(3))
        assert shard.get_tensor("features").shape == (sum(cells_of(n)[..., 0].size for n in range(3)), DIM)


def test_a_place_is_the_same_in_another_process(tmp_path):
    field = StoredField(fill(tmp_path, range(3)), key_of(2))
    sent = pickle.loads(pickle.dumps(field))
    assert sent == field and hash(sent) == hash(field)
    np.testing.assert_array_equal(load_stored(sent).features, load_stored(field).features)
    assert count_stored(sent) == len(load_stored(field))
    write_features(tmp_path / "slide.h5", load_stored(field))
    assert count_stored(str(tmp_path / "slide.h5")) == count_stored(field)


def test_many_fields_are_few_files(tmp_path, monkeypatch):
    monkeypatch.setattr("frugalpath.slides.field_store.SHARD_BYTES", 400)
    store = fill(tmp_path, range(100))
    assert 5 < len(shards(tmp_path)) < 30
    assert all(holds(store, n) for n in range(100))
    assert all(holds(open_store(tmp_path), n) for n in range(100))


def test_what_was_added_is_written_after_a_while(tmp_path, monkeypatch):
    """So that a slow encoder loses little when it is killed."""
    monkeypatch.setattr("frugalpath.slides.field_store.PAUSES", (0.0, 0.0))
    with open_store(tmp_path) as store:
        for number in range(3):
            store.add(key_of(number), cells_of(number))
            assert len(shards(tmp_path)) == number + 1


def test_what_was_added_before_an_error_is_kept(tmp_path):
    with pytest.raises(RuntimeError, match="of something else"), open_store(tmp_path) as store:
        store.add(key_of(0), cells_of(0))
        raise RuntimeError("of something else")
    assert holds(open_store(tmp_path), 0)


def test_two_writers_at_once(tmp_path):
    """Both hold some of the same fields; each sees the other's when it looks again."""
    first, second = open_store(tmp_path), open_store(tmp_path)
    with first, second:
        for number in range(10):
            first.add(key_of(number), cells_of(number))
            second.add(key_of(number + 5), cells_of(number + 5))
    assert len(shards(tmp_path)) == 2
    for store in (first, second, open_store(tmp_path)):
        store.refresh()
        assert len(store) == 15 and all(holds(store, n) for n in range(15))


def test_a_field_that_is_damaged_in_one_shard_is_read_from_another(tmp_path):
    fill(tmp_path, range(2))
    bad = shards(tmp_path)[0]
    raw = bytearray(bad.read_bytes())
    raw[-1] ^= 1
    bad.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{bad.name}: damaged, .* delete the file and run the command again"):
        open_store(tmp_path).read(key_of(1))
    assert holds(open_store(tmp_path), 0), "the other field of the shard"
    fill(tmp_path, [1])
    assert holds(open_store(tmp_path), 1)


@pytest.mark.parametrize("part", range(1, 8))
def test_a_shard_that_was_cut_gives_what_is_before_the_cut(tmp_path, part, caplog):
    fill(tmp_path, range(8))
    fill(tmp_path, range(8, 12))
    cut = next(p for p in shards(tmp_path) if safe_open(p, "numpy").get_tensor("keys").shape[0] == 8)
    raw = cut.read_bytes()
    cut.write_bytes(raw[: len(raw) * part // 8])
    store = open_store(tmp_path)
    lost = store.missing([key_of(n) for n in range(12)])
    assert lost and set(lost) <= {key_of(n) for n in range(8)}
    kept = [n for n in range(12) if key_of(n) not in lost]
    assert all(holds(store, n) for n in kept) and set(kept) >= {8, 9, 10, 11}
    assert part < 6 or len(kept) > 4, "the index stands before the features"
    assert cut.name in caplog.text
    fill(tmp_path, [n for n in range(12) if key_of(n) in lost])
    assert all(holds(open_store(tmp_path), n) for n in range(12))


def test_no_byte_that_changes_gives_other_features(tmp_path):
    """Wherever a shard is damaged, a field is read as it was written or not at all."""
    fill(tmp_path, range(4))
    (path,) = shards(tmp_path)
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x11]) + raw[at + 1 :])
        store = open_store(tmp_path)
        for number in range(4):
            if store.missing([key_of(number)]):
                continue
            with contextlib.suppress(InputError):  # refused, which is no wrong result
                assert holds(store, number), at


def test_other_files_are_left_alone(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "abcd1234-mine.safetensors").write_text("not a shard")
    (tmp_path / "abcd1234-empty.safetensors").touch()
    store = fill(tmp_path, range(2))
    assert holds(store, 1) and len(store) == 2
    assert "abcd1234-mine.safetensors: no store of features, or damaged" in caplog.text
    other = FieldStore(tmp_path, "ffff0000", stride=16, encoder="mean", fingerprint="mean@2")
    assert other.missing([key_of(0)]) == [key_of(0)], "another encoder's"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file: features cannot be written \(.*\); free space there, or choose"):
        fill(tmp_path / "file", [1])


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import frugalpath.slides.field_store as module
from tests.slides.test_field_store import cells_of, key_of, open_store
module.SHARD_BYTES = 300
with open_store(sys.argv[1]) as store:
    for number in range(10**9):
        store.add(key_of(number), cells_of(number))
        if number == 40:
            print("ready", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_shards(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(ROOT)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    store = open_store(tmp_path)
    assert len(store) > 20 and all(holds(store, n) for n in range(len(store)))
    fill(tmp_path, range(len(store), 3000))
    assert holds(open_store(tmp_path), 2999)
