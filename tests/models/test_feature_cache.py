from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from frugalpath.errors import InputError
from frugalpath.models.feature_cache import FeatureCache, cache_key, content_hash, module_revision

GB = 1e9


def key(index: int) -> str:
    return cache_key(str(index), (1, 4, 4), "tower")


def value(index: int, rows: int = 16, width: int = 16) -> torch.Tensor:
    """(rows, width) float32, the same in every process; 1024 bytes unless told."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(index))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def age(cache: FeatureCache, index: int, seconds: float) -> None:
    """Put the last use of a key so far into the past: the clock of a file system can be coarse."""
    then = time.time() - seconds
    os.utime(cache._path(key(index)), (then, then))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_exactly(tmp_path, dtype):
    cache = FeatureCache(tmp_path / "new" / "cache")
    features = value(0).to(dtype)
    assert cache.get(key(0)) is None
    cache.put(key(0), features)
    found = cache.get(key(0))
    assert found is not None and found.dtype == dtype and torch.equal(found, features)
    assert (cache.hits, cache.misses) == (1, 1)
    assert (cache.folder / key(0)[:2] / f"{key(0)}.safetensors").is_file()
    assert torch.equal(FeatureCache(cache.folder).get(key(0)), features)  # another run finds it


def test_cast_to_bfloat16_rounds(tmp_path):
    cache = FeatureCache(tmp_path, dtype=torch.bfloat16)
    exact = value(0).bfloat16()
    cache.put(key(0), exact)
    assert torch.equal(cache.get(key(0)), exact)
    features = value(1)
    cache.put(key(1), features)
    found = cache.get(key(1))
    assert found is not None and found.dtype == torch.bfloat16
    assert ((found.float() - features).abs() <= 2**-8 * features.abs()).all()  # 8 bits of mantissa, to the nearest


def test_views_gradients_and_empty_features_are_stored(tmp_path):
    cache = FeatureCache(tmp_path)
    whole = value(0, 40).requires_grad_()
    for index, features in enumerate([whole[10:20], whole[:, ::2], whole[:0]]):
        cache.put(key(index), features)
        found = cache.get(key(index))
        assert found is not None and torch.equal(found, features) and not found.requires_grad
    assert size_of(tmp_path) < whole.nbytes * 2  # a view does not bring its whole storage along


def test_an_existing_key_is_left_alone(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.put(key(0), value(0))
    cache.put(key(0), value(1))
    assert torch.equal(cache.get(key(0)), value(0))


def test_key_depends_on_content_grid_and_revision():
    keys = {
        cache_key(content, grid, revision)
        for content in (b"one", b"two")
        for grid in ((1, 4, 6), (1, 6, 4), (14, 6))
        for revision in ("a", "b")
    }
    assert len(keys) == 12
    assert cache_key(b"one", torch.tensor([1, 4, 6]), "a") == cache_key(b"one", list(np.array([1, 4, 6])), "a") in keys


def test_a_file_and_its_bytes_have_one_key(tmp_path):
    (tmp_path / "image").write_bytes(b"pixels")
    assert cache_key(content_hash(tmp_path / "image"), (1, 2), "a") == cache_key(b"pixels", (1, 2), "a")


def test_least_recently_used_go_first(tmp_path):
    cache = FeatureCache(tmp_path, limit_gb=12_000 / GB)
    for index in range(10):  # each is 1024 bytes and a header
        cache.put(key(index), value(index))
        age(cache, index, 100 - index)
    size = size_of(tmp_path)
    assert size <= cache.limit < size + size // 10  # one more does not fit
    assert cache.get(key(0)) is not None  # the oldest becomes the newest
    cache.put(key(10), value(10))
    left = [index for index in range(11) if cache._path(key(index)).exists()]
    assert left == [0, *range(3, 11)]  # 1 and 2 went: nine files are under 90 %, ten are not
    assert size_of(tmp_path) < 0.9 * cache.limit


def test_folder_stays_within_its_limit(tmp_path):
    cache = FeatureCache(tmp_path, limit_gb=10_000 / GB)
    for index in range(40):
        cache.put(key(index), value(index))
        assert size_of(tmp_path) <= cache.limit
        assert torch.equal(cache.get(key(index)), value(index))


def test_what_an_earlier_run_left_counts(tmp_path):
    earlier = FeatureCache(tmp_path)
    for index in range(20):
        earlier.put(key(index), value(index))
        age(earlier, index, 100 - index)
    cache = FeatureCache(tmp_path, limit_gb=10_000 / GB)
    cache.put(key(20), value(20))
    assert size_of(tmp_path) <= cache.limit
    assert cache.get(key(0)) is None and cache.get(key(19)) is not None and cache.get(key(20)) is not None


def test_what_another_process_adds_is_noticed(tmp_path):
    one, two = (FeatureCache(tmp_path, limit_gb=100_000 / GB) for _ in range(2))
    for index in range(200):  # without a new count each would fill the limit by itself
        (one, two)[index % 2].put(key(index), value(index))
        assert size_of(tmp_path) <= 1.12 * one.limit  # 2 x (5 % and one value of about 1 %)


def test_a_value_over_the_limit_is_not_kept(tmp_path, caplog):
    cache = FeatureCache(tmp_path, limit_gb=5_000 / GB)
    cache.put(key(0), value(0))
    for index in (1, 2):
        cache.put(key(index), value(index, 100))
        assert cache.get(key(index)) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(tmp_path) in caplog.text and "raise limit_gb" in caplog.text
    assert torch.equal(cache.get(key(0)), value(0))


def test_a_value_of_nearly_the_limit_is_kept(tmp_path):
    cache = FeatureCache(tmp_path, limit_gb=5_000 / GB)
    cache.put(key(0), value(0))
    age(cache, 0, 10)
    cache.put(key(1), value(1, 75))  # 4800 bytes and a header: over 90 %
    assert cache.get(key(0)) is None
    assert torch.equal(cache.get(key(1)), value(1, 75))


def test_left_over_temporary_files_go(tmp_path):
    cache = FeatureCache(tmp_path)
    (tmp_path / "ab").mkdir()
    dead, live = (tmp_path / "ab" / f"abc.safetensors.{pid}.1.part" for pid in (1, 2))
    for part in (dead, live):
        part.write_bytes(b"half")
    os.utime(dead, (0, 0))
    cache.put(key(0), value(0))
    assert not dead.exists() and live.exists()


@pytest.mark.parametrize("length", [0, 4, 40, 600])
def test_a_damaged_file_is_a_miss(tmp_path, caplog, length):
    cache = FeatureCache(tmp_path)
    cache.put(key(0), value(0))
    path = cache._path(key(0))
    os.truncate(path, length)
    assert cache.get(key(0)) is None
    assert not path.exists() and str(path) in caplog.text
    assert (cache.hits, cache.misses) == (0, 1)
    cache.put(key(0), value(0))
    assert torch.equal(cache.get(key(0)), value(0))


def test_eviction_while_others_read_is_a_miss(tmp_path):
    """A thread removes and restores files as fast as it can; a reader sees the right value or a miss."""
    cache, done = FeatureCache(tmp_path), threading.Event()

    def churn() -> None:
        writer = FeatureCache(tmp_path)
        while not done.is_set():
            writer.put(key(0), value(0))
            writer._path(key(0)).unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        deadline = time.monotonic() + 5
        while not (cache.hits > 50 and cache.misses > 50) and time.monotonic() < deadline:
            found = cache.get(key(0))
            assert found is None or torch.equal(found, value(0))
    finally:
        done.set()
        thread.join()
    assert cache.hits > 0 and cache.misses > 0


def share(folder: str, start: int, limit: int, results) -> None:
    """Worker: puts and gets 60 keys, of which others use 40 as well; tells wrong values, hits and misses."""
    torch.set_num_threads(1)
    cache, wrong = FeatureCache(folder, limit_gb=limit / GB), 0
    for index in [*range(start, start + 60)] * 2:
        found = cache.get(key(index))
        wrong += found is not None and not torch.equal(found, value(index))
        cache.put(key(index), value(index))
    results.put((wrong, cache.hits, cache.misses))


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    results, limit = context.Queue(), 60_000  # about 53 values; the three put 100
    arguments = [(str(tmp_path), 20 * rank, limit, results) for rank in range(3)]
    workers = [context.Process(target=share, args=given, daemon=True) for given in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    told = [results.get(timeout=5) for _ in workers]
    assert [wrong for wrong, _, _ in told] == [0, 0, 0]
    assert all(hits + misses == 120 for _, hits, misses in told)
    size = size_of(tmp_path)
    assert 0 < size <= limit * 1.15 + 3 * 1200
    assert not list(tmp_path.rglob("*.part"))
    cache = FeatureCache(tmp_path)
    left = [index for index in range(100) if cache._path(key(index)).exists()]
    assert left and all(torch.equal(cache.get(key(index)), value(index)) for index in left)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o500)
    with pytest.raises(InputError, match=f"{folder}: cannot write the feature cache .*name a folder"):
        FeatureCache(folder)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=f"{tmp_path / 'cache'}: cannot write the feature cache .*name a folder"):
        FeatureCache(tmp_path / "cache")


def test_a_folder_that_fails_later_is_named(tmp_path):
    cache = FeatureCache(tmp_path)
    (tmp_path / key(0)[:2]).write_text("a file where a folder should be")
    with pytest.raises(InputError, match=f"{tmp_path}: cannot write the feature cache"):
        cache.put(key(0), value(0))


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_has_to_be_positive(tmp_path, limit):
    with pytest.raises(InputError, match="limit_gb"):
        FeatureCache(tmp_path, limit_gb=limit)


def test_hash_of_a_file_follows_its_content(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    first = content_hash(path)
    assert content_hash(str(path)) == first
    path.write_bytes(b"two")  # the same size
    os.utime(path, (2, 2))
    second = content_hash(path)
    assert second != first
    path.write_bytes(b"one")
    os.utime(path, (3, 3))
    assert content_hash(path) == first
    with pytest.raises(InputError, match="missing"):
        content_hash(tmp_path / "missing")


def test_hash_of_an_image_follows_mode_size_and_pixels():
    pixels = np.arange(48, dtype=np.uint8)
    images = [
        Image.fromarray(pixels.reshape(4, 4, 3)),
        Image.fromarray(pixels.reshape(2, 8, 3)),
        Image.fromarray(pixels.reshape(6, 8)),
        Image.fromarray(pixels[::-1].reshape(4, 4, 3).copy()),
    ]
    for colours in (b"\x00\x00\x00\xff\x00\x00", b"\x00\x00\x00\x00\xff\x00"):
        paletted = Image.new("P", (2, 2), 1)
        paletted.putpalette(colours)
        images.append(paletted)
    hashes = [content_hash(image) for image in images]
    assert len(set(hashes)) == len(images)
    assert hashes == [content_hash(image.copy()) for image in images]


def tower(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_revision_follows_the_weights(tmp_path, dtype):
    module = tower(dtype)
    revision = module_revision(module)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        module[0].weight[3, 2] += 0.5
    assert module_revision(module) != revision
    module.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert module_revision(module) == revision
    module[1].running_mean[0] += 1  # buffers count
    assert module_revision(module) != revision


def test_revision_follows_dtype_shape_and_names():
    square, wide = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        wide.weight.copy_(square.weight.reshape(2, 8))
    modules = [square, wide, torch.nn.Sequential(square), tower(), tower(torch.bfloat16)]
    assert len({module_revision(module) for module in modules}) == len(modules)


def test_sharded_weights_have_no_revision():
    module = torch.nn.Linear(2, 2)
    module.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(InputError, match="weight is empty"):
        module_revision(module)
