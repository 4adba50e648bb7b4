"""Ways to keep the features of many fields of view: seconds to write and to read at random, files and bytes.

    pip install zarr webdataset pylance
    python benchmarks/field_stores.py

Each way keeps `--fields` maps of 3 x 3 cells of 1,280 float16 values (96 px through EfficientNet-Lite0), written in
ten parts as a run and its resumes would, and then reads `--reads` of them at random by key in a new process. Ways
whose package is not installed are left out. `cut` is the share of the fields that can still be read when the largest
file has lost its last third. One JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import MARK, Others, give, machine

SHAPE = (3, 3, 1280)
PARTS = 10


def key_of(number: int) -> str:
    """A SHA-256 in hex, as of an image's content."""
    import hashlib

    return hashlib.sha256(str(number).encode()).hexdigest()


def fields(start: int, end: int) -> Iterator[tuple[str, np.ndarray]]:
    """Keys and made-up maps."""
    for number in range(start, end):
        yield key_of(number), np.random.default_rng(number).standard_normal(SHAPE, np.float32).astype(np.float16)


class Shards:
    """`frugalpath.slides.field_store.FieldStore`."""

    package = "safetensors"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        with open_shards(folder) as store:
            for key, cells in found:
                store.add(key, cells)

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        store = open_shards(folder)
        return lambda key: store.read(key).features


def open_shards(folder: Path) -> Any:
    """Our store."""
    from frugalpath.slides.field_store import FieldStore

    return FieldStore(folder, "abcd1234", stride=32, encoder="none", fingerprint="none@0")


class Files:
    """An HDF5 file a field, as before."""

    package = "h5py"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        from frugalpath.slides.store import Features, write_features

        down, across = np.mgrid[: SHAPE[0], : SHAPE[1]] * 32
        places = np.stack([across.ravel(), down.ravel()], 1)
        for key, cells in found:
            stored = Features(cells.reshape(-1, SHAPE[2]), places, {"patch_size": 32})
            write_features(folder / f"{key}.h5", stored, dtype="float16")

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        from frugalpath.slides.store import read_features

        return lambda key: read_features(folder / f"{key}.h5").features


class OneHdf5:
    """One HDF5 file with a dataset a field; one writer at a time."""

    package = "h5py"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        import h5py

        with h5py.File(folder / "all.h5", "a") as file:
            for key, cells in found:
                file[key] = cells

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        import h5py

        file = h5py.File(folder / "all.h5")
        return lambda key: file[key][()].astype(np.float32)


class Zarr:
    """A zarr array, sharded, with the keys beside it; appends rewrite the last shard."""

    package = "zarr"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        import zarr

        keys, cells = zip(*found, strict=True)
        rows = np.stack(cells)
        if part == 0:
            zarr.create_array(
                folder / "all.zarr", shape=(0, *SHAPE), chunks=(1, *SHAPE), shards=(2048, *SHAPE), dtype="float16"
            )
        array = zarr.open_array(folder / "all.zarr", mode="r+")
        array.append(rows)
        with open(folder / "keys.txt", "a") as file:
            file.writelines(f"{key}\n" for key in keys)

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        import zarr

        at = {key: i for i, key in enumerate((folder / "keys.txt").read_text().split())}
        array = zarr.open_array(folder / "all.zarr", mode="r")
        return lambda key: array[at[key]].astype(np.float32)


class WebDataset:
    """Tar shards of WebDataset; it reads in order, so that fields at random need a pass of the tar headers."""

    package = "webdataset"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        import webdataset

        with webdataset.TarWriter(str(folder / f"{part}.tar")) as tar:
            for key, cells in found:
                tar.write({"__key__": key, "npy": cells})

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        import io
        import tarfile

        place = {}
        for path in sorted(folder.glob("*.tar")):
            tar = tarfile.open(path)  # noqa: SIM115, it is read from until the process ends
            place |= {member.name.partition(".")[0]: (tar, member) for member in tar}

        def read(key: str) -> np.ndarray:
            tar, member = place[key]
            found = tar.extractfile(member)
            assert found is not None
            return np.load(io.BytesIO(found.read())).astype(np.float32)

        return read


class Lance:
    """A Lance table; every append is a version of its own."""

    package = "pylance"

    @staticmethod
    def write(folder: Path, part: int, found: Iterable[tuple[str, np.ndarray]]) -> None:
        """Append a part."""
        import lance
        import pyarrow as pa

        keys, cells = zip(*found, strict=True)
        table = pa.table({"key": keys, "cells": [c.tobytes() for c in cells]})
        lance.write_dataset(table, str(folder / "all.lance"), mode="append" if part else "create")

    @staticmethod
    def reader(folder: Path) -> Callable[[str], np.ndarray]:
        """What reads a field by its key."""
        import lance

        table = lance.dataset(str(folder / "all.lance"))
        at = {key: i for i, key in enumerate(table.to_table(columns=["key"])["key"].to_pylist())}

        def read(key: str) -> np.ndarray:
            raw = table.take([at[key]], columns=["cells"])["cells"][0].as_py()
            return np.frombuffer(raw, np.float16).reshape(SHAPE).astype(np.float32)

        return read


WAYS = {"shards": Shards, "files": Files, "one_hdf5": OneHdf5, "zarr": Zarr, "webdataset": WebDataset, "lance": Lance}


def work(name: str, act: str, folder: Path, count: int, reads: int) -> None:
    """One process: write all, or read at random."""
    way = WAYS[name]
    if act == "write":
        began = time.perf_counter()
        made = 0.0
        for part in range(PARTS):
            start = time.perf_counter()
            found = list(fields(part * count // PARTS, (part + 1) * count // PARTS))
            made += time.perf_counter() - start
            way.write(folder, part, found)
        give({"seconds": time.perf_counter() - began - made})
        return
    numbers = np.random.default_rng(1).permutation(count)[:reads].tolist()
    expected = {n: next(fields(n, n + 1))[1].reshape(-1) for n in numbers}
    began = time.perf_counter()
    whole = 0
    try:
        read = way.reader(folder)
        for number in numbers:
            try:
                whole += bool(np.array_equal(read(key_of(number)).reshape(-1), expected[number].astype(np.float32)))
            except Exception as error:  # each way has its own; what is asked is how many fields are left
                print(f"{name}: {error}"[:200], file=sys.stderr)
    except Exception as error:  # nothing can be read at all
        print(f"{name}: {error}"[:200], file=sys.stderr)
    give({"seconds": time.perf_counter() - began, "whole": whole / len(numbers)})


def run(name: str, act: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A process of its own."""
    command = [sys.executable, __file__, "--worker", name, act, str(folder)]
    command += ["--fields", str(options.fields), "--reads", str(options.reads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or MARK not in done.stdout:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.partition(MARK)[2])


def main() -> None:
    """Run every way that is installed and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=20_000)
    parser.add_argument("--reads", type=int, default=5_000)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, act, folder = options.worker
        work(name, act, Path(folder), options.fields, options.reads)
        return
    others, result = Others(), {}
    for name, way in WAYS.items():
        module = {"pylance": "lance"}.get(way.package, way.package)
        if importlib.util.find_spec(module) is None:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            written = run(name, "write", folder, options)["seconds"]
            read = run(name, "read", folder, options)
            assert read["whole"] == 1.0, f"{name} does not give what was written"
            files = [p for p in folder.rglob("*") if p.is_file()]
            largest = max(files, key=lambda p: p.stat().st_size)
            size = sum(p.stat().st_size for p in files)
            with open(largest, "r+b") as file:
                file.truncate(largest.stat().st_size * 2 // 3)
            left = run(name, "read", folder, options)["whole"]
        result[name] = {
            "version": version(way.package),
            "write_s": round(written, 2),
            "read_s": round(read["seconds"], 2),
            "files": len(files),
            "mb": round(size / 1e6, 1),
            "cut": round(left, 3),
        }
    about = {"fields": options.fields, "reads": options.reads, "others_busy": others.busy(), "machine": machine("cpu")}
    print(json.dumps(result | about))


if __name__ == "__main__":
    main()
