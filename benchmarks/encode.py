"""Fields a second from image files to stored features: in batches against one by one, and two processes against one.

    python benchmarks/encode.py
    python benchmarks/encode.py --images ../shared/data/tiles/pcam/images --device cuda

The peer reads an image ahead, encodes each in a forward of its own and writes an HDF5 file for each, as versions
before the store of shards did. Ours is `slides.fields.encode_fields`. Both hash the files, decode them, encode them by
the packaged EfficientNet-Lite0 and store float16, on all `--cores`. `batched_ratio` is the peer's time over ours.
`sharded_ratio` is the time of one process of one thread over that of two such processes which share the fields out.

Every run is a process of its own and an empty folder; loading of libraries and encoder is not timed. Runs take turns,
and the printed JSON line holds the medians of `--repeats`. `max_feature_diff` is the largest difference of a feature
between batches and one by one, in float32, as a share of the largest feature; `stored_equal` the share of the stored
float16 values that are the same. `others_busy` is the fraction of the cores' time that other processes took: above a
few per cent the ratios are not to be trusted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.measure import MARK, Others, give, machine, settle, versions
from frugalpath.errors import InputError, entry

KINDS = {"single": 1, "batched": 1, "one": 1, "two": 2}
"""Processes of each kind of run."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fields", type=int, default=1500, help="how many images")
    parser.add_argument("--side", type=int, default=96, help="px of the images that are made")
    parser.add_argument("--images", type=Path, help="a folder of images to take instead, of --fields at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = "float32"
    return options


@entry
def main() -> None:
    """Run all kinds in turns and print one JSON line."""
    options = parse()
    if options.worker:
        work()
        return
    settle(options)
    import numpy
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = images(options, Path(folder) / "images")
        others = Others()
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for repeat in range(options.repeats):
            for kind in KINDS:
                plan = {"kind": kind, "paths": paths, "out": f"{folder}/{kind}{repeat}", "device": options.device}
                seconds[kind].append(run(plan, options.cores))
        busy = others.busy()
        stored_equal = compare(f"{folder}/single0", f"{folder}/batched0", paths)
        found = difference(paths, options.device)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    pairs = {"batched_ratio": ("single", "batched"), "sharded_ratio": ("one", "two")}
    ratios = {name: [a / b for a, b in zip(seconds[x], seconds[y], strict=True)] for name, (x, y) in pairs.items()}
    result: dict[str, Any] = {name: round(statistics.median(values), 2) for name, values in ratios.items()}
    result |= {f"{name}_range": [round(min(v), 2), round(max(v), 2)] for name, v in ratios.items()}
    result |= {f"{kind}_fields_per_s": round(len(paths) / seconds, 1) for kind, seconds in median.items()}
    result |= {"max_feature_diff": found, "stored_equal": stored_equal, "fields": len(paths)}
    result |= {"repeats": options.repeats, "others_busy": busy, "device": options.device, "cores": options.cores}
    print(json.dumps(result | {"machine": machine(options.device), "versions": versions(torch, numpy)}))


def images(options: argparse.Namespace, folder: Path) -> list[str]:
    """Paths of the images: those of a folder, or smooth colours of stained tissue with grain, as PNG."""
    import numpy as np
    from PIL import Image

    if options.images:
        paths = sorted(str(p) for p in options.images.iterdir() if p.is_file())[: options.fields]
        if not paths:
            raise InputError(f"--images {options.images}: no files there")
        return paths
    folder.mkdir()
    made = []
    rng = np.random.default_rng(0)
    for number in range(options.fields):
        coarse = rng.uniform((150, 80, 140), (250, 210, 235), (7, 7, 3)).astype(np.uint8)
        tissue = np.asarray(Image.fromarray(coarse).resize((options.side, options.side), Image.Resampling.BICUBIC))
        grain = rng.normal(0, 12, tissue.shape)
        path = folder / f"{number}.png"
        Image.fromarray(np.clip(tissue + grain, 0, 255).astype(np.uint8)).save(path)
        made.append(str(path))
    return made


def run(plan: dict[str, Any], cores: int) -> float:
    """Seconds from the word to begin to the last process's end."""
    world = KINDS[plan["kind"]]
    threads = cores if plan["kind"] in ("single", "batched") else 1
    workers = []
    for rank in range(world):
        told = json.dumps({**plan, "rank": rank, "world": world, "threads": threads})
        cache = {"XDG_CACHE_HOME": f"{plan['out']}.cache", "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, __file__, "--worker"]
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | cache
        )
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(told + "\n")
        worker.stdin.flush()
        workers.append(worker)
    for worker in workers:
        if worker.stdout.readline() != "ready\n":  # type: ignore[union-attr]
            raise SystemExit(f"a process of {plan['kind']} failed; its message stands above")
    began = time.perf_counter()
    for worker in workers:
        worker.stdin.write("begin\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
    ended = []
    for worker in workers:
        said, _ = worker.communicate()
        if worker.returncode or MARK not in said:
            raise SystemExit(f"a process of {plan['kind']} failed; its message stands above")
        ended.append(json.loads(said.partition(MARK)[2])["end"])
    return max(ended) - began


def work() -> None:
    """One process of a run: told what to do, and then when to begin, on standard input."""
    plan = json.loads(sys.stdin.readline())
    import torch

    from frugalpath.slides.encoder import load_encoder
    from frugalpath.slides.fields import encode_fields

    torch.set_num_threads(plan["threads"])
    encoder = load_encoder(device=plan["device"])
    if plan["kind"] in ("one", "two"):
        own = sorted(os.sched_getaffinity(0))[plan["rank"] :][:1]
        os.sched_setaffinity(0, own)
    encoder.feature_map(torch.zeros(8, 96, 96, 3, dtype=torch.uint8))
    print("ready", flush=True)
    sys.stdin.readline()
    if plan["kind"] == "single":
        one_by_one(plan["paths"], Path(plan["out"]), encoder)
    else:
        shares = {"rank": plan["rank"], "world": plan["world"]}
        encode_fields(plan["paths"], plan["out"], encoder, progress=False, **shares)
    give({"end": time.perf_counter()})


def one_by_one(paths: list[str], out: Path, encoder: Any) -> None:
    """The way before: a forward and an HDF5 file an image, while the next one is decoded."""
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    import numpy as np

    from frugalpath.slides.content import file_digests
    from frugalpath.slides.fields import read_field
    from frugalpath.slides.store import Features, write_features

    digests, _ = file_digests(paths)
    with ThreadPoolExecutor(1) as reader:
        read = partial(read_field, side=None, stride=encoder.stride)
        upcoming = reader.submit(read, paths[0])
        for at, path in enumerate(paths):
            pixels = upcoming.result()
            if at + 1 < len(paths):
                upcoming = reader.submit(read, paths[at + 1])
            grid = encoder.feature_map(pixels[None])[0].cpu().numpy()
            rows, columns, dim = grid.shape
            down, across = np.mgrid[:rows, :columns] * encoder.stride
            places = np.stack([across.ravel(), down.ravel()], 1)
            attrs = {"encoder": encoder.name, "patch_size": encoder.stride}
            stored = Features(grid.reshape(-1, dim), places, attrs)
            write_features(out / f"{digests[path][:32]}.h5", stored, dtype="float16")


def compare(single: str, batched: str, paths: list[str]) -> float:
    """Share of the stored values that are the same."""
    import numpy as np

    from frugalpath.slides.encoder import load_encoder
    from frugalpath.slides.field_store import load_stored
    from frugalpath.slides.fields import encode_fields
    from frugalpath.slides.store import read_features

    files = encode_fields(paths, batched, load_encoder(), progress=False)  # all there: nothing is encoded
    same = values = 0
    for path in paths:
        ours = files[path]
        assert not isinstance(ours, str)
        there = read_features(Path(single) / f"{ours.key[:32]}.h5").features
        here = load_stored(ours).features
        same += int(np.sum(there == here))
        values += here.size
    return round(same / values, 6)


def difference(paths: list[str], device: str) -> float:
    """Largest difference of a float32 feature between batches and one by one, as a share of the largest feature."""
    import numpy as np

    from frugalpath.slides.encoder import load_encoder
    from frugalpath.slides.fields import read_field

    encoder = load_encoder(device=device)
    found = [read_field(p, side=None, stride=encoder.stride) for p in paths[:256]]
    pixels = [p for p in found if not isinstance(p, str) and p.shape == getattr(found[0], "shape", None)]
    together = encoder.feature_map(np.stack(pixels))
    alone = [encoder.feature_map(p[None])[0] for p in pixels]
    largest = max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))
    return float(f"{largest / float(together.abs().max()):.2e}")


if __name__ == "__main__":
    main()
