"""Seconds and memory that it takes to read and check a manifest of images, the first time and again.

    python benchmarks/manifest.py --rows 1000000

Writes as many small images as rows under `--folder`, each with pixels of its own, and three manifests of them: `cases`
(JSON lines of whole cases), `labels_csv` and `labels_parquet` (a file, a label and a patient in each row; the splits
are drawn by patient). What is there already is used again; none of this is timed.

Each manifest is then read by a process of its own with an empty cache (`first_s`), and by `--repeats` more, each a new
one too (`again_s`, the slowest). Seconds are those of the whole process, from its start to a list of checked cases;
`*_cpu_s` are those that its cores worked, which depend less on what else the machine does. Memory is the peak resident
set of the process and all its children added up, looked at every 50 ms, or the highest of the process by itself where
that is more. The files were written or read before, so the machine may have them in memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from loky import ProcessPoolExecutor, cpu_count
from PIL import Image

from benchmarks.measure import MARK, Others, give
from frugalpath.errors import entry

LABELS = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
PROMPT = "Which tissue is this?"
SPLITS = {"val_fraction": 0.1, "test_fraction": 0.1}
IN_FOLDER = 1000  # images of one folder
CASES_OF_PATIENT = 5


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/manifest"), help="where images and manifests are kept"
    )
    parser.add_argument("--side", type=int, default=32, help="px of the images")
    parser.add_argument("--formats", nargs="+", choices=list(MANIFESTS), default=list(MANIFESTS))
    parser.add_argument("--repeats", type=int, default=2, help="readings again")
    parser.add_argument("--cores", type=int, default=2, help="cores that the whole benchmark may use")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def image_name(number: int) -> str:
    """Path of an image below the folder: PNG and JPEG by turns."""
    return f"images/{number // IN_FOLDER:05d}/{number:08d}{('.png', '.jpg')[number % 2]}"


def write_images(folder: Path, first: int, last: int, side: int) -> None:
    """Write those that are not there yet: a smooth ground, and a corner of noise that no other image has."""
    across = np.linspace(0, 1, side)[None, :, None]
    for number in range(first, last):
        path = folder / image_name(number)
        if path.exists():
            continue
        rng = np.random.default_rng(number)
        low, high = rng.integers(90, 250, (2, 3))
        pixels = np.broadcast_to(low + (high - low) * across, (side, side, 3)).astype(np.uint8)
        pixels[:12, :12] = rng.integers(0, 256, (12, 12, 3))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=80)


def label(number: int) -> str:
    """Label of an image."""
    return LABELS[number * 7919 % len(LABELS)]


def write_cases(path: Path, rows: int) -> None:
    """A manifest of whole cases, which states the splits."""
    with open(path, "w") as file:
        for number in range(rows):
            patient = number // CASES_OF_PATIENT
            case = {
                "id": f"case-{number}",
                "patient": f"patient-{patient}",
                "task": "choice",
                "prompt": PROMPT,
                "answer": label(number),
                "options": LABELS,
                "images": [image_name(number)],
                "split": "test" if patient % 10 == 0 else "val" if patient % 10 == 1 else "train",
            }
            file.write(json.dumps(case) + "\n")


def write_csv(path: Path, rows: int) -> None:
    """A manifest of labels."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "patient"])
        writer.writerows((image_name(n), label(n), f"patient-{n // CASES_OF_PATIENT}") for n in range(rows))


def write_parquet(path: Path, rows: int) -> None:
    """The same as parquet."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "file": [image_name(n) for n in range(rows)],
        "label": [label(n) for n in range(rows)],
        "patient": [f"patient-{n // CASES_OF_PATIENT}" for n in range(rows)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


MANIFESTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "cases": (write_cases, "cases-{}.jsonl", {}),
    "labels_csv": (write_csv, "labels-{}.csv", {"prompt": PROMPT, **SPLITS}),
    "labels_parquet": (write_parquet, "labels-{}.parquet", {"prompt": PROMPT, "format": "labels", **SPLITS}),
}


def write(options: argparse.Namespace) -> None:
    """Images and manifests."""
    edges = [*range(0, options.rows, IN_FOLDER), options.rows]
    with ProcessPoolExecutor(min(options.cores, cpu_count())) as pool:
        jobs = [pool.submit(write_images, options.folder, low, high, options.side) for low, high in pairwise(edges)]
        for job in jobs:
            job.result()
    for name in options.formats:
        writer, file, _ = MANIFESTS[name]
        path = options.folder / file.format(options.rows)
        if not path.exists():
            writer(path, options.rows)


def work(options: argparse.Namespace) -> None:
    """Read one manifest in this process."""
    from frugalpath.envs.manifest import build

    _, file, params = MANIFESTS[options.worker]
    cases = build(path=str(options.folder / file.format(options.rows)), **params)
    give({"cases": len(cases), "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


class Memory(threading.Thread):
    """Peak of the resident sets of a process and its children, added up."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.peak, self.ended = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            total = 0
            try:
                for each in (self.process, *self.process.children(recursive=True)):
                    total += each.memory_info().rss
            except psutil.NoSuchProcess:
                pass  # it ended between the two
            self.peak = max(self.peak, total)


def cpu_seconds() -> float:
    """Of all children that have ended, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(name: str, options: argparse.Namespace, cache: str) -> dict[str, Any]:
    """One reading in a new process."""
    command = [
        sys.executable,
        __file__,
        "--worker",
        name,
        "--rows",
        str(options.rows),
        "--folder",
        str(options.folder),
    ]
    start, worked = time.perf_counter(), cpu_seconds()
    process = subprocess.Popen(
        command, env=os.environ | {"XDG_CACHE_HOME": cache}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    memory = Memory(process.pid)
    memory.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - start
    memory.ended.set()
    memory.join()
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    if process.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{errors[-4000:]}")
    result = json.loads(lines[0][len(MARK) :])
    worked = cpu_seconds() - worked
    return {"seconds": seconds, "cpu": worked, "peak": max(memory.peak, result["rss"]), "cases": result["cases"]}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """First reading of a manifest and readings again."""
    cache = tempfile.mkdtemp(dir=options.folder)
    try:
        first = read(name, options, cache)
        again = [read(name, options, cache) for _ in range(options.repeats)]
        size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    finally:
        shutil.rmtree(cache)
    return {
        "cases": first["cases"],
        "first_s": round(first["seconds"], 1),
        "again_s": round(max(each["seconds"] for each in again), 1),
        "first_cpu_s": round(first["cpu"], 1),
        "again_cpu_s": round(max(each["cpu"] for each in again), 1),
        "first_peak_gb": round(first["peak"] / 1e9, 2),
        "again_peak_gb": round(max(each["peak"] for each in again) / 1e9, 2),
        "cache_mb": round(size / 1e6, 2),
    }


@entry
def main() -> None:
    """Write, measure, print one JSON line."""
    options = parse()
    options.folder = options.folder.absolute()
    if options.worker:
        return work(options)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options)
    size = (options.folder / image_name(options.rows - 1)).stat().st_size
    others = Others()
    formats = {name: measure(name, options) for name in options.formats}
    result = {
        "rows": options.rows,
        "distinct_images": options.rows,
        "image_px": options.side,
        "image_bytes": size,
        "formats": formats,
        **{key: max(found[key] for found in formats.values()) for key in ("first_s", "again_s")},
        "peak_gb": max(found[key] for found in formats.values() for key in ("first_peak_gb", "again_peak_gb")),
        "repeats": options.repeats,
        "cores": options.cores,
        "others_busy": others.busy(),
        "versions": {"python": platform.python_version(), "pillow": Image.__version__, "numpy": np.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
