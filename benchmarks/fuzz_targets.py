"""The parsers of what others write, as functions of bytes. Examples of their input are in `fuzz_inputs.py`.

Each target may raise `InputError` and nothing else. Targets that read files write the bytes to one file first.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from benchmarks.fuzz_inputs import (
    CASES_CSV,
    COMPLETION_WORDS,
    COMPLETIONS,
    CSV,
    CSV_WORDS,
    JSON_WORDS,
    PROTOCOL,
    REPORT_WORDS,
    REPORTS,
    ROWS,
    SWIFT,
    YAML_WORDS,
)
from frugalpath.envs.manifest import build
from frugalpath.envs.new_cases import read_new_cases
from frugalpath.rewards.answer import extract_answer, form_of
from frugalpath.rewards.detection import ap50, parse_boxes
from frugalpath.rewards.entities import entity_f1_score, find_entities, read_vocabulary
from frugalpath.rewards.label import choice
from frugalpath.rewards.synoptic import protocol as protocols
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.reward import synoptic
from frugalpath.rewards.text import rouge_l
from frugalpath.slides.field_store import FieldStore
from frugalpath.slides.images import read_image
from frugalpath.slides.jobs import find_jobs
from frugalpath.slides.store import Features, write_features
from frugalpath.slides.trial import try_features

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """One parser.

    Args:
        run: reads one input.
        seeds: valid inputs, and some that are nearly so.
        words: pieces that mean something to it.
        share: of the inputs of a whole run.
    """

    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()
    share: float = 1.0


@cache
def folder() -> Path:
    """Where this process puts its files: in memory where the machine has such a place."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    _kept.append(made)
    os.environ["XDG_CACHE_HOME"] = made.name  # the cache of checked files
    home = Path(made.name) / "home"
    home.mkdir()
    for name in ("0.png", "1.png", "m.png"):
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3) // (1 + (name == "m.png"))).save(home / name)
    (home / "s.svs").write_bytes(b"slide")
    return home


_kept: list[tempfile.TemporaryDirectory] = []


def _file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


# Manifests.


def _lines(*rows: dict) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _manifest(suffix: str, data: bytes) -> None:
    """The whole environment, by parameters that the first byte chooses."""
    params = _PARAMS[data[0] % len(_PARAMS)] if data else {}
    path = str(_file(f"cases{suffix}", data[1:]))
    if params is None:
        read_new_cases(path, {"task": "open", "prompt": "q"})
    else:
        build(path=path, **params)


_PARAMS: list[dict | None] = [
    {},
    {"task": "choice", "prompt": "q", "options": ["a", "b"], "duplicates": "drop"},
    {"task": "detection", "prompt": "q", "box_frame": "pixels", "val_fraction": 0.3},
    {"prompt": "q", "format": "labels", "mask_column": "mask", "question": "k"},
    {"prompt": "q", "format": "labels", "labels": {"a": "x", "b": "y"}, "limit": 2, "test_fraction": 0.2},
    {"format": "swift", "task": "open", "patient_pattern": r"(\w)"},
    {"format": "cases", "task": "open", "only": {"split": "train"}},
    None,
]


def _parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def _varied(*seeds: bytes) -> list[bytes]:
    return [bytes([i]) + seed for seed in seeds for i in range(len(_PARAMS))]


# Feature files.


def _hdf5(change: Callable[[h5py.File], object] | None = None) -> bytes:
    path = folder() / "seed.h5"
    made = Features(
        np.ones((3, 2)), np.arange(6).reshape(3, 2), {"patch_size": 32, "mpp": 0.5, "width": 64, "note": "x"}
    )
    write_features(path, made)
    if change is not None:
        with h5py.File(path, "r+") as file:
            change(file)
    return path.read_bytes()


def _compressed(file: h5py.File) -> None:
    values = file["features"][()]
    del file["features"]
    file.create_dataset("features", data=values[None], compression="gzip", chunks=True, shuffle=True)


def _declared(file: h5py.File) -> None:
    del file["features"], file["coords"]
    file.create_dataset("features", (10**12, 4), "f4", chunks=(1024, 4))
    file.create_dataset("coords", (10**12, 2), "i8", chunks=(1024, 2))


def _clam(file: h5py.File) -> None:
    for key in list(file.attrs):
        del file.attrs[key]
    for key in list(file["coords"].attrs):
        del file["coords"].attrs[key]
    file["coords"].attrs.update(patch_size=256, patch_level=1, downsample=np.array([4.0, 4.0]), name=b"a\xff")


def _features(data: bytes) -> None:
    _file("fuzzed.h5", data)
    next(_trial())


def _shard() -> bytes:
    store = _shards("seed")
    with store:
        for key, cells in _fields().items():
            store.add(key, cells)
    return next(store.folder.glob("*.safetensors")).read_bytes()


@cache
def _fields() -> dict[str, np.ndarray]:
    return {f"{i:064x}": np.arange(i * 6, dtype=np.float16).reshape(i, 2, 3) for i in range(1, 4)}


def _shards(name: str) -> FieldStore:
    return FieldStore(folder() / name, "abcd1234", stride=32, encoder="none", fingerprint="none@0")


def _fields_of_shard(data: bytes) -> None:
    _file("shards/abcd1234-fuzzed.safetensors", data)
    store = _shards("shards")
    for key in set(_fields()) - set(store.missing(list(_fields()))):
        cells = _fields()[key].reshape(-1, 3)
        assert np.array_equal(store.read(key).features, cells), "what is read is what was written"


@cache
def _trial() -> Iterator[object]:
    """As a run first reads the feature files that it is given: elsewhere, since the HDF5 library may crash."""
    path = str(folder() / "fuzzed.h5")
    return try_features((path for _ in count()), timeout=10.0)


# YAML.


def _protocol(data: bytes) -> None:
    path = _file("fuzzed.yaml", data)
    try:
        found = protocols.load_protocol(path)
    finally:
        protocols._load.cache_clear()
    parse_report("grade: 1\nsize: 3 mm\nmargin: involved, x; y", found)


def _recipe(data: bytes) -> None:
    from frugalpath.recipe.run import parse_recipe

    path = _file("recipe.yaml", data)
    try:
        parse_recipe(["--config", str(path), "--output_dir", str(folder() / "run")])
    except SystemExit as error:  # argparse's own message and status for a bad value
        if error.code != 2:
            raise


def _yaml_seeds(*names: str) -> list[bytes]:
    return [path.read_bytes() for name in names for path in sorted((ROOT / "configs").glob(name))]


# Completions and reports.


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape" if data[:1] == b"!" else "replace")


def _answer(data: bytes) -> None:
    text = _text(data)
    extract_answer(text), form_of(text)
    extract_answer([{"role": "assistant", "content": text}, {"role": "tool", "content": [{"text": text}]}])


def _boxes(data: bytes) -> None:
    text = _text(data)
    parse_boxes(text)
    ap50([f"<answer>{text}</answer>"], answer=["[[0, 0, 10, 10]]"])


def _choice(data: bytes) -> None:
    text = _text(data)
    parts = text.split("|")
    choice(
        [f"<answer>{text}</answer>", text], answer=["benign", parts[0]], options=[["benign", "(B) malignant"], parts]
    )


def _report(data: bytes) -> None:
    names = _names()
    text = _text(data[1:])
    parse_report(text, protocols.load_protocol(names[data[0] % len(names)] if data else names[0]))


def _synoptic(data: bytes) -> None:
    text = _text(data)
    gold = "Histologic type: invasive carcinoma of no special type\nNottingham grade: 2\nTumor size: 21 mm"
    synoptic([f"<answer>{text}</answer>"], answer=[gold], protocol=["breast_resection"], id=["1"])


@cache
def _names() -> list[str]:
    return protocols.protocol_names()


def _entities(data: bytes) -> None:
    text, terms = _text(data), read_vocabulary()
    find_entities(text, terms)
    entity_f1_score(text, "Invasive ductal carcinoma, no lymphovascular invasion.", terms)
    rouge_l([f"<answer>{text}</answer>"], answer=["invasive carcinoma"])


def _vocabulary(data: bytes) -> None:
    path = _file("terms.txt", data)
    read_vocabulary.__wrapped__(str(path))


def _image(data: bytes) -> None:
    read_image(_file("fuzzed.img", data), max_pixels=10_000)


def _picture(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _jobs(suffix: str, data: bytes) -> None:
    find_jobs(_file(f"slides{suffix}", data))


@cache
def targets() -> dict[str, Target]:
    """All of them by name."""
    jsonl = _varied(_lines(*ROWS), _lines(SWIFT, SWIFT))
    tables = [CSV, b"\xef\xbb\xbf" + CSV, CASES_CSV]
    links = (_declared, _compressed, _clam)
    protocol_files = [PROTOCOL, *(p for p in _yaml_seeds("protocols/*.yaml") if len(p) < 6000)]
    images: list[tuple[str, dict[str, object]]] = [
        *((kind, {}) for kind in ("PNG", "JPEG", "TIFF")),
        ("TIFF", {"compression": "tiff_lzw"}),
        *((kind, {}) for kind in ("BMP", "WEBP", "GIF", "JPEG2000", "PPM")),
        ("PNG", {"mode": "P"}),
        ("TIFF", {"mode": "CMYK"}),
    ]
    files = {
        "manifest_jsonl": Target(partial(_manifest, ".jsonl"), jsonl, JSON_WORDS, 3),
        "manifest_json": Target(partial(_manifest, ".json"), _varied(json.dumps(ROWS).encode()), JSON_WORDS, 2),
        "manifest_csv": Target(partial(_manifest, ".csv"), _varied(*tables), CSV_WORDS, 3),
        "manifest_tsv": Target(
            partial(_manifest, ".tsv"), _varied(*(t.replace(b",", b"\t") for t in tables)), CSV_WORDS, 1
        ),
        "manifest_parquet": Target(
            partial(_manifest, ".parquet"), _varied(_parquet(ROWS[:1]), _parquet([SWIFT])), (), 2
        ),
        "slide_jobs_csv": Target(
            partial(_jobs, ".csv"), [CSV, b"slide,id,case,stain,mpp\na.svs,x,1,HE,0.5\n"], CSV_WORDS, 1
        ),
        "slide_jobs_jsonl": Target(
            partial(_jobs, ".jsonl"), [b'{"file": "a.svs", "mpp": 0.5, "id": 3}'], JSON_WORDS, 1
        ),
        "features_hdf5": Target(_features, [_hdf5(), *map(_hdf5, links)], (), 6),
        "features_shard": Target(_fields_of_shard, [_shard()], JSON_WORDS, 6),
        "protocol_yaml": Target(_protocol, protocol_files, YAML_WORDS, 2),
        "recipe_yaml": Target(_recipe, _yaml_seeds("recipes/demo.yaml", "recipes/pathosynvlm.yaml"), YAML_WORDS, 0.5),
        "image": Target(_image, [_picture(kind, **keys) for kind, keys in images], (), 3),
    }
    texts = {
        "extract_answer": Target(_answer, COMPLETIONS, COMPLETION_WORDS, 15),
        "boxes": Target(_boxes, COMPLETIONS, COMPLETION_WORDS, 15),
        "choice": Target(_choice, COMPLETIONS, COMPLETION_WORDS, 15),
        "report": Target(_report, [bytes([i]) + r for r in REPORTS for i in range(len(_names()))], REPORT_WORDS, 15),
        "synoptic": Target(_synoptic, REPORTS, REPORT_WORDS, 10),
        "entities": Target(_entities, REPORTS, REPORT_WORDS, 10),
        "vocabulary": Target(
            _vocabulary, [b"# terms\ncarcinoma|cancer\nmetastases\n"], [b"|", b"#", b"\n", b"\x1c"], 2
        ),
    }
    return texts | files
