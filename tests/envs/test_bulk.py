"""All rows at once become what they would one by one, and files looked at in processes are what they are here."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from frugalpath.envs import convert, files
from frugalpath.envs.case import Case, faulty_cases, with_splits
from frugalpath.envs.files import FoundFiles, inspect_files, resolve_path
from frugalpath.envs.manifest import build
from frugalpath.envs.quick import kinds_of, quick_rows
from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError
from frugalpath.slides.content import file_keys


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a link, a protocol; the manifests of each test beside them."""
    home = tmp_path_factory.mktemp("home")
    for i in range(6):
        path = home / f"{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(path)
    (home / "link.png").symlink_to(home / "a/2.png")
    (home / "own.yaml").write_text("title: own\n")
    (home.parent / "outside.png").write_bytes((home / "a/0.png").read_bytes())
    return home


def both_ways(monkeypatch, **params):
    """Cases or problems all at once, and row by row; how many cases were made at once."""
    at_once = []

    def result():
        try:
            return [(case, case.patient_named, type(case.extra)) for case in build(**params)]
        except InputError as error:
            return error.problems

    bulk = convert.bulk_cases

    def counted(*args):
        found = bulk(*args)
        at_once.append(0 if found is None else len(found))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(convert, "bulk_cases", counted)
        first = result()
        patch.setattr(convert, "bulk_cases", lambda *_: None)
        patch.setenv("XDG_CACHE_HOME", str(params["path"]) + "-cache")
        return first, result(), max(at_once, default=0)


def write(home, rows, name):
    path = home / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        names = list(dict.fromkeys(name for each in rows for name in each))
        lines = [",".join(names), *(",".join(str(each.get(name, "")) for name in names) for each in rows)]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def case_row(i, **change):
    values = {"id": f"c{i}", "patient": f"p{i}", "task": "choice", "prompt": "?", "answer": "x", "options": ["x", "y"]}
    values |= {"images": [f"{'ab'[i % 2]}/{i}.png"], **change}
    return {name: value for name, value in values.items() if value is not ...}


CASES = {
    "plain": ([{}] * 4, {}),
    "numbers": ([{"id": i, "patient": i, "answer": "x", "age": 60 + i, "mpp": "0.5"} for i in range(4)], {}),
    "a path": ([{"images": "a/0.png"}, {"prompt": "Another?"}], {}),
    "several": (
        [{"images": ["a/0.png", "b/1.png"], "slides": ["own.yaml"]}, {"images": [], "slides": "own.yaml"}],
        {},
    ),
    "links": ([{"images": ["link.png"]}, {"images": [f"{os.curdir}/b/../b/3.png"]}], {}),
    "defaults": (
        [{"task": ..., "prompt": ..., "options": ...}] * 3,
        {"task": "choice", "prompt": "Which?", "options": ["x", "y"], "question": "kind"},
    ),
    "split": ([{"split": s} for s in ("train", "Validation", "testing")], {}),
    "split column": ([{"fold": s, "split": "val"} for s in ("train", "dev")], {"split_column": "fold"}),
    "group": ([{"patient": ..., "group": f"g{i}"} for i in range(3)], {}),
    "subject": ([{"subject": f"s{i}"} for i in range(3)], {"patient_column": "subject"}),
    "pattern": ([{}] * 3, {"patient_pattern": r"^(\d)"}),
    "open": ([{"task": "open", "options": ..., "answer": f"Text {i}", "rationale": None} for i in range(3)], {}),
    "boxes": ([{"task": "detection", "options": ..., "answer": [[1, 2, 3.5, 4]]}] * 2, {}),
    "synoptic": (
        [
            {"task": "synoptic", "options": ..., "answer": {"grade": i}, "protocol": p}
            for i, p in enumerate(["own.yaml", "biopsy"])
        ],
        {},
    ),
    "other columns": ([{"note": None}, {"note": float("nan")}, {"note": [1]}, {"flag": True}], {}),
    "questions": ([{"question": ""}, {"question": "q"}, {}], {"question": "kind"}),
}
WRONG = {
    "answer": ([{}, {"answer": "z"}], {}),
    "no file": ([{}, {"images": ["gone.png"]}], {}),
    "outside": ([{"images": ["../outside.png"]}, {}], {}),
    "blank": ([{"images": [" "]}, {"images": [""]}, {"images": ["a"]}, {"images": ["a/"]}], {}),
    "no images": ([{"images": []}, {"images": ...}], {}),
    "repeated id": ([{"id": "same"}] * 2, {}),
    "no split": ([{"split": "val"}, {}], {}),
    "bad split": ([{"split": "all"}, {"split": "val"}], {}),
    "empty patient": ([{"patient": ""}, {"patient": " "}], {}),
    "no patient": ([{"patient": ...}, {}], {}),
    "empty prompt": ([{"prompt": " "}, {}], {}),
    "boolean": ([{"answer": True}, {"id": True}], {}),
    "options": ([{"options": "x"}, {"options": ["x"]}, {"options": ["x", "X"]}, {"options": [{"x": 1}]}], {}),
    "options of open": ([{"task": "open"}], {}),
    "options given as text": ([{"options": ...}], {"options": "xy"}),
    "resolution": ([{"mpp": -1}, {"mpp": "fine"}], {}),
    "lists for texts": ([{"id": ["a"]}, {"prompt": {"a": 1}}, {"answer": ["x"]}], {}),
    "pattern": ([{}], {"patient_pattern": r"^(\D)"}),
    "protocol": ([{"protocol": "gone.yaml"}], {}),
    "numbers among images": ([{"images": [1]}, {"images": ["a/0.png", None]}], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_cases_at_once(home, monkeypatch, name):
    changes, params = CASES[name]
    path = write(home, [case_row(i, **change) for i, change in enumerate(changes)], f"{name}.jsonl")
    first, second, at_once = both_ways(monkeypatch, path=path, **params)
    assert first == second and at_once == len(changes) == len(first)
    assert all(isinstance(each, tuple) for each in first), "cases, not problems"


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_alike(home, monkeypatch, name):
    changes, params = WRONG[name]
    path = write(home, [case_row(i, **change) for i, change in enumerate(changes)], f"{name}.jsonl")
    first, second, _ = both_ways(monkeypatch, path=path, **params)
    assert first == second and all(isinstance(each, str) for each in first) and first


LABELS = [{"file": f"{'ab'[i % 2]}/{i}.png", "label": "ST"[i % 2]} for i in range(4)]
LABEL_PARAMS = {
    "plain": ({}, {}),
    "patients": ({"patient": "p"}, {}),
    "names": ({}, {"labels": {"T": "tumour", "S": "stroma"}, "question": "tissue"}),
    "pattern": ({}, {"patient_pattern": r"(\d)\."}),
    "others": ({"mpp": 0.5, "site": "liver"}, {}),
    "prompts": ({"prompt": "Own?"}, {}),
    "splits": ({"split": "Training"}, {}),
    "slides": ({}, {"slide_column": "file"}),
    "open": ({}, {"task": "open"}),
    "unknown label": ({}, {"labels": {"T": "tumour"}}),
    "no column": ({}, {"patient_column": "subject"}),
    "own options": ({"options": "S"}, {}),
    "an answer too": ({"answer": "S"}, {}),
}


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("name", LABEL_PARAMS)
def test_labels_at_once(home, monkeypatch, name, suffix):
    columns, params = LABEL_PARAMS[name]
    path = write(home, [each | columns for each in LABELS], f"labels {name}.{suffix}")
    first, second, at_once = both_ways(monkeypatch, path=path, **{"prompt": "?", "format": "labels", **params})
    assert first == second
    if name not in ("unknown label", "no column", "own options", "an answer too"):
        assert at_once == len(first) == 4


@pytest.mark.parametrize("missing", ["id", "prompt", "mpp", "patient", "split", "label", "file", "question", "note"])
def test_empty_cells_of_parquet(home, monkeypatch, missing):
    """Rows of labels in parquet hold None where those of CSV lack the column."""
    rows = [
        each | {missing: each.get(missing, "train" if missing == "split" else "1") if i else None}
        for i, each in enumerate(LABELS)
    ]
    path = write(home, rows, f"empty {missing}.parquet")
    first, second, _ = both_ways(monkeypatch, path=path, prompt="?", format="labels")
    assert first == second


VALUES = st.none() | st.sampled_from(
    ["x", "y", "a/0.png", "b/1.png", "", "train", "[1]", '["a/0.png"]', 1, 2.5, True, float("nan")]
)
COLUMNS = st.sampled_from(
    [
        "id",
        "patient",
        "group",
        "task",
        "prompt",
        "answer",
        "images",
        "slides",
        "options",
        "split",
        "question",
        "mpp",
        "age",
        "protocol",
    ]
)


@given(
    st.lists(st.dictionaries(COLUMNS, VALUES | st.lists(VALUES, max_size=2), max_size=3), min_size=1, max_size=3),
    st.sampled_from(["auto", "labels"]),
    st.sampled_from(
        [
            {},
            {"question": "q"},
            {"options": ["x", "y"]},
            {"patient_column": "age"},
            {"answer_column": "age", "image_column": "images"},
        ]
    ),
)
def test_any_rows_are_read_alike(home, changes, format, params):
    rows = [case_row(i) | change for i, change in enumerate(changes)]
    with pytest.MonkeyPatch.context() as patch:
        path = write(home, rows, "any.jsonl")
        first, second, _ = both_ways(patch, path=path, prompt="?", format=format, **params)
    assert repr(first) == repr(second)  # NaN is not equal to itself


# ---- reading again


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            st.none()
            | st.text(max_size=3)
            | st.integers(-9, 9)
            | st.floats()
            | st.booleans()
            | st.lists(st.text(max_size=2), max_size=2),
            max_size=3,
        ),
        max_size=5,
    )
)
def test_quick_rows_are_those_of_the_lines(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("quick") / "a.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in entries))
    rows, _ = read_rows(path)
    if kinds := kinds_of(path, rows):
        again = quick_rows(path, kinds)
        assert repr([row.values for row in again]) == repr([row.values for row in rows])
        assert [row.at for row in again] == [row.at for row in rows]


def test_usual_rows_are_read_quickly(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(case_row(i, age=i, mpp=0.5, seen=True)) + "\n" for i in range(20)))
    kinds = kinds_of(path, read_rows(path)[0])
    assert kinds["id"] == "few str" and kinds["options"] == "few list" and kinds["age"] == "int"
    path.write_text(path.read_text() + '{"other": 1}\n')
    assert quick_rows(path, kinds) is None, "the file has changed"


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '\n{"a": "x"}', '{"a": ["x", "\\u001fy"]}', '{"a": "\\ud800"}', '{"a": {"b": 1}}']
)
def test_rows_that_pyarrow_would_read_otherwise_are_left_to_the_lines(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x"}\n' + line + "\n" if "[" not in line else line + "\n")
    rows, problems = read_rows(path)
    assert not problems and kinds_of(path, rows) is None


# ---- cases and files


def test_cases_from_columns_and_in_other_splits():
    made = [Case(**case_row(i) | {"id": f"{i}", "images": ("a.png",)}, extra={"n": i}) for i in range(3)]
    columns = {name: [getattr(case, name) for case in made] for name in Case.__dataclass_fields__}
    assert Case.from_columns(columns, 3) == made
    moved = with_splits(made, ["train", "val", "train"])
    assert [case.split for case in moved] == ["train", "val", "train"] and moved[0] is made[0]
    assert moved[1].extra == {"n": 1} and moved[1].extra is not made[1].extra and made[1].split == "train"


def test_faulty_cases_are_those_with_problems():
    rows = [{}, {"answer": "z"}, {}, {"patient": " "}, {"images": ()}, {"task": "open"}, {"split": "all"}, {"id": ""}]
    cases = [Case(**case_row(i, **change)) for i, change in enumerate(rows * 2)]
    cases.append(Case(**case_row(99), extra={"task": "open"}))
    assert faulty_cases(cases) == [i for i, case in enumerate(cases) if case.problems()]
    assert len(faulty_cases(cases)) == 13


ENTRIES = [
    "a/0.png",
    "b/../b/1.png",
    "./a//2.png",
    "link.png",
    "a",
    "a/",
    "",
    " ",
    "gone.png",
    "../outside.png",
    "x\0",
    "b/1.png/",
    "/",
    "a/..",
]


@pytest.mark.parametrize("allow_outside", [False, True])
def test_files_found_together_are_those_found_one_by_one(home, allow_outside):
    entries = [*ENTRIES, str(home / "b/3.png"), str(home.parent / "outside.png"), *ENTRIES]
    found = FoundFiles(entries, home, allow_outside=allow_outside)
    assert not found.finish()
    expected = {}
    for entry in entries:
        try:
            expected[entry] = str(resolve_path(entry, home, allow_outside=allow_outside))
        except ValueError:
            continue
    assert found.paths == expected
    assert found.keys() == file_keys(expected.values())[0]
    assert FoundFiles(["a/0.png"], home).finish()
    assert not FoundFiles([], home).keys()


@pytest.mark.slow
def test_processes_find_what_threads_find(home, monkeypatch, tmp_path):
    (tmp_path / "broken.png").write_bytes((home / "a/0.png").read_bytes()[:90])
    (tmp_path / "empty.png").touch()
    images = [*map(str, sorted(home.glob("?/*.png"))), str(tmp_path / "broken.png"), str(tmp_path / "empty.png")]
    here = inspect_files(images, [str(home / "own.yaml")], use_cache=False)
    monkeypatch.setattr(files, "_MANY", 1)
    monkeypatch.setattr(files, "_BLOCK", 2)
    monkeypatch.setattr("frugalpath.slides.content.cpu_count", lambda: 2)
    assert inspect_files(images, [str(home / "own.yaml")], use_cache=False) == here
    assert len(here[0]) == 7 and len(here[1]) == 2 and "truncated" in here[1][images[-2]]
