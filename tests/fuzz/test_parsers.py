"""Whatever stands in a file or a completion, a parser reads it or says by `InputError` what is wrong with it."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Child, mutate
from benchmarks.fuzz_targets import folder, targets
from frugalpath.envs.manifest import build
from frugalpath.errors import InputError
from frugalpath.parsing import parse_yaml
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.slides.store import read_features

NAMES = (
    "boxes", "choice", "entities", "extract_answer", "features_hdf5", "features_shard", "image", "manifest_csv",
    "manifest_json", "manifest_jsonl", "manifest_parquet", "manifest_tsv", "protocol_yaml", "recipe_yaml", "report",
    "slide_jobs_csv", "slide_jobs_jsonl", "synoptic", "vocabulary",
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["0.png", "../x", "a"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))


def test_every_parser_is_named():
    assert sorted(targets()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_changed_examples(name):
    target = targets()[name]

    @settings(max_examples=5 if name == "recipe_yaml" else settings.default.max_examples)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        with suppress(InputError):
            target.run(mutate(target.seeds, target.words, random.Random(seed)))

    check()


COLUMNS = (
    "id patient group task prompt answer images slides options protocol split question mpp messages solution file"
)


@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS.split()), VALUES, max_size=12), max_size=4), st.integers(0, 7))
def test_rows_of_any_values(rows, how):
    data = bytes([how]) + "\n".join(json.dumps(row) for row in rows).encode("utf-8", "replace")
    with suppress(InputError):
        targets()["manifest_jsonl"].run(data)


NODES = st.sampled_from(
    [
        "id",
        "name",
        "type",
        "values",
        "class",
        "unit",
        "fields",
        "derive",
        "applies_if",
        "groups",
        "key",
        "tolerance",
        "aliases",
    ]
)
FIELDS = st.dictionaries(
    NODES, VALUES | st.sampled_from(["ordinal", "boolean", "list", "multi", "number", "core", "mm", "a"])
)


@given(st.lists(FIELDS, max_size=3), st.dictionaries(st.sampled_from(["layout", "extends", "title"]), VALUES))
def test_protocols_of_any_values(fields, head):
    text = yaml.safe_dump({"title": "t", "version": 1, "source": "s", "fields": fields, **head})
    with suppress(InputError):
        targets()["protocol_yaml"].run(text.encode("utf-8", "replace"))


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DTYPES = st.sampled_from(["f4", "f8", "i8", "u1", "S3", "c8", "?", h5py.string_dtype(), [("a", "f4")], h5py.ref_dtype])
ATTRS = st.dictionaries(
    st.sampled_from(["patch_size", "patch_size_level0", "downsample", "mpp", "target_magnification", "width"]),
    st.floats() | st.integers(-9, 9) | st.sampled_from(["", "x", "1e3"])
    | st.just(np.array([1.0, np.nan])) | st.just(h5py.Empty("f4")) | st.just(np.zeros((2, 2), "S2")),
)  # fmt: skip


@given(SHAPES, SHAPES, DTYPES, DTYPES, ATTRS, st.booleans())
def test_feature_files_of_any_shape(shape, places, kind, other, attrs, on_coords):
    path = folder() / "shaped.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", shape, kind)
        file.create_dataset("coords", places, other)
        (file["coords"] if on_coords else file).attrs.update(attrs)
    with suppress(InputError):
        read_features(path)


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_yaml_of_any_text(text):
    with suppress(InputError):
        parse_yaml(text, "here")


# What fuzzing found.


@pytest.mark.parametrize(
    "row",
    [
        '{"id": ' + "1" * 5000 + "}",
        "[" * 100_000,
        '{"id": 1, "patient": 1, "task": "detection", "prompt": "q", "images": "0.png", "answer": "'
        + "[" * 9000
        + '"}',
        '{"id": 1, "patient": 1, "task": "open", "prompt": "q", "answer": "a", "images": "' + "x/" * 4000 + '"}',
        '{"id": 1, "patient": 1, "task": "open", "prompt": "q", "answer": "a", "images": "\\ud800.png"}',
        '{"messages": [{"role": [], "content": "a"}]}',
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_rows_that_broke_the_reader(row, suffix):
    path = folder() / f"broken.{suffix}"
    path.write_text(row if suffix == "jsonl" else f"[{row}]")
    with pytest.raises(InputError):
        build(path=str(path))


def test_rows_without_messages_in_the_form_of_swift():
    path = folder() / "swift.jsonl"
    path.write_text('{"images": "0.png"}')
    with pytest.raises(InputError, match="`messages` must be a list"):
        build(path=str(path), format="swift", task="open")


@pytest.mark.parametrize("number", ["1e999", "Infinity", "NaN", "1" * 400])
def test_boxes_in_pixels_that_no_image_has(number):
    path = folder() / "boxes.jsonl"
    path.write_text(
        '{"id": 1, "patient": 1, "task": "detection", "prompt": "q", "images": "0.png", '
        f'"answer": [[0, 0, 1, {number}]]}}'
    )
    with pytest.raises(InputError, match=r"broken|boxes"):
        build(path=str(path), box_frame="pixels")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a: 2001-99-99",
        "a: !!int ''",
        "a: 0x" + "f" * 5000,
        "a: " + "1" * 5000,
        "[" * 3000,
        "a: &a [*a]",
        "a: \0",
        "!!bool x",
    ],
)
def test_yaml_that_broke_the_reader(text):
    with pytest.raises(InputError, match="here: "):
        parse_yaml(text, "here")


def test_an_alias_of_aliases_is_not_written_out():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(InputError, match="more than 200,000 values"):
        parse_yaml("\n".join(lines), "here")
    merged = ["a0: &a0 {k: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)]
    with pytest.raises(InputError, match="more than 200,000 values"):
        parse_yaml("\n".join(merged), "here")


@pytest.mark.parametrize("name", ["../../../etc/x", "/etc/x", "..", ""])
def test_a_protocol_name_is_no_path(name):
    with pytest.raises(InputError, match="unknown protocol"):
        load_protocol(name)


def test_a_report_nested_deep():
    assert not parse_report('{"a":' * 3000, load_protocol("breast_resection")).readable


@pytest.mark.parametrize(
    "text",
    ["not applicable", "Prostate, biopsy;\nnot applicable", f"Breast, {'x' * 2001}\n, biopsy\n;\n1. a", "x" * 3000],
)
def test_a_biopsy_report_that_is_none(text):
    from frugalpath.rewards.synoptic.biopsy import parse_biopsy

    protocol = load_protocol("biopsy")
    assert parse_report(text, protocol).problems
    parse_biopsy(text.replace("x", " x "), protocol)


def test_what_is_not_handled_is_kept(tmp_path):
    def run(data: bytes) -> None:
        raise KeyError(data) if data == b"bad" else InputError("no")

    child = Child(run, InputError, tmp_path)
    for data in (b"good", b"bad", b"bad"):
        child(data)
    child.write()
    found = json.loads((tmp_path / "result").read_text())
    assert found["count"] == 3 and list(found["found"].values()) == [2]
    assert (tmp_path / "input0").read_bytes() == b"bad" and "KeyError" in (tmp_path / "trace0").read_text()
