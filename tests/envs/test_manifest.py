import csv
import inspect
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from frugalpath.envs import mosaic
from frugalpath.envs.boxes import boxes_from_mask, to_frame
from frugalpath.envs.checks import check_cases
from frugalpath.envs.files import inspect_files
from frugalpath.envs.manifest import build, read_manifest
from frugalpath.envs.registry import load_cases
from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError

DATA = Path("../shared/data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real sets are not here")


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def image(path, seed=0, size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def row(i, **change):
    values = {"id": f"c{i}", "patient": f"p{i}", "task": "choice", "prompt": "Which?", "answer": "benign"}
    return values | {"options": ["benign", "malignant"], "images": [f"{i}.png"], "split": "train"} | change


def write_jsonl(home, rows, name="cases.jsonl"):
    path = home / name
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in rows))
    return str(path)


def write_csv(home, header, rows, name="manifest.csv"):
    path = home / name
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def problems_of(**params):
    with pytest.raises(InputError) as error:
        build(**params)
    return error.value.problems


# ---- formats


def test_jsonl_parquet_and_json_say_the_same(home):
    for i in range(3):
        image(home / f"{i}.png", i)
    rows = [row(i, age=60 + i) for i in range(3)]
    jsonl = read_manifest(write_jsonl(home, rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), home / "cases.parquet")
    (home / "cases.json").write_text(json.dumps(rows, indent=1))
    assert jsonl == read_manifest(home / "cases.parquet") == read_manifest(home / "cases.json")
    assert jsonl[1].images == (str(home / "1.png"),)
    assert jsonl[2].extra == {"age": 62}


def test_cases_are_loaded_by_path_or_by_the_name_of_an_environment(home, monkeypatch):
    image(home / "0.png")
    path = write_jsonl(home, [row(0)])
    assert load_cases(path) == load_cases(Path(path), seed=1) == read_manifest(path)
    (home / "mine.py").write_text(
        f"from frugalpath.envs.manifest import read_manifest\n\n\ndef cases(*, limit=None):\n"
        f"    return read_manifest({path!r}, limit=limit)\n"
    )
    assert load_cases(f"{home / 'mine.py'}:cases", limit=1) == read_manifest(path)
    monkeypatch.chdir(home)
    for source in ("manifest", Path("simulator")):
        with pytest.raises(InputError, match="'path'" if source == "manifest" else "no manifest simulator"):
            load_cases(source)
    with pytest.raises(InputError, match="no parameter 'sede'; did you mean 'seed'"):
        load_cases(path, sede=1)


def test_what_is_written_is_read_by_datasets_too(home):
    image(home / "0.png")
    path = write_jsonl(home, [read_manifest(write_jsonl(home, [row(0)]))[0].to_dict()], "out.jsonl")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("json", data_files=path, cache_dir=str(home / "datasets"), split="train")
    assert loaded[0]["answer"] == "benign"


def test_csv_of_files_and_labels(home):
    for i in range(4):
        image(home / f"images/{i}.png", i)
    rows = [[f"images/{i}.png", "IM"[i % 2], "training", f"g{i}", 0.5] for i in range(3)]
    rows.append(["images/3.png", "M", "Validation", "g3", 0.5])
    path = write_csv(home, ["file", "label", "split", "group", "mpp"], rows)
    cases = build(path=path, prompt="Invasive?", labels={"M": "in situ", "I": "invasive"}, question="invasion")
    assert [case.answer for case in cases] == ["invasive", "in situ", "invasive", "in situ"]
    assert cases[0].options == ("in situ", "invasive")  # the order the user gave
    assert [case.split for case in cases] == ["train"] * 3 + ["val"]
    assert [case.patient for case in cases] == ["g0", "g1", "g2", "g3"]
    assert cases[0].id == "invasion/images/0.png" and cases[0].question == "invasion"
    assert cases[0].extra == {"group": "g0", "mpp": 0.5}


def test_options_of_labels_are_all_labels_sorted(home):
    for i in range(3):
        image(home / f"{i}.png", i)
    path = write_csv(home, ["file", "label"], [["0.png", "c"], ["1.png", "a"], ["2.png", "b"]])
    assert {case.options for case in build(path=path, prompt="?")} == {("a", "b", "c")}


def test_only_keeps_rows_and_patients_come_from_file_names(home):
    for i in range(6):
        image(home / f"P{i // 2}-{i}.png", i)
    rows = [[f"P{i // 2}-{i}.png", "ab"[i % 2], ["10x", "40x"][i // 3]] for i in range(6)]
    path = write_csv(home, ["file", "label", "magnification"], rows)
    cases = build(
        path=path, prompt="?", only={"magnification": "40x"}, patient_pattern=r"^(P\d+)-", options=["a", "b"]
    )
    assert [case.patient for case in cases] == ["P1", "P2", "P2"]


def test_csv_of_whole_cases(home):
    image(home / "0.png")
    header = ["id", "patient", "task", "prompt", "answer", "images", "options"]
    path = write_csv(home, header, [["a", "p", "choice", "Which,\nplease?", "x", "0.png", '["x", "y"]']])
    (case,) = build(path=path)
    assert case.prompt == "Which,\nplease?" and case.options == ("x", "y")


@pytest.mark.parametrize("split", [True, False])
def test_folder_per_class(home, split):
    for i, (part, label) in enumerate([("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]):
        image(home / "set" / (f"{part}/{label}" if split else label) / f"{i}.png", i)
    cases = build(path=str(home / "set"), prompt="Which?")
    assert [case.answer for case in cases] == (["a", "b", "a", "b"] if split else ["a", "a", "b", "b"])
    assert {case.split for case in cases} == ({"train", "test"} if split else {"train"})


def test_slides_of_a_csv(home):
    (home / "a.svs").write_bytes(b"a slide is hashed, not opened")
    path = write_csv(home, ["slide", "label"], [["a.svs", "x"]])
    (case,) = build(path=path, prompt="?", slide_column="slide", options=["x", "y"])
    assert case.slides == (str(home / "a.svs"),) and case.images == ()


def test_detection_from_masks(home):
    image(home / "0.png", size=(200, 100))
    mask = np.zeros((100, 200), np.uint8)
    mask[10:20, 20:60] = 7
    mask[50:100, 100:200] = 3
    Image.fromarray(mask).save(home / "m.png")
    path = write_csv(home, ["file", "mask", "label"], [["0.png", "m.png", "x"]])
    (case,) = build(path=path, prompt="Glands?", mask_column="mask")
    assert case.task == "detection" and json.loads(case.answer) == [[100, 100, 300, 200], [500, 500, 1000, 1000]]
    assert case.extra == {"label": "x"}
    image(home / "0.png", size=(100, 100))
    assert "must agree" in problems_of(path=path, prompt="Glands?", mask_column="mask")[0]


def test_pixel_boxes_become_thousandths(home):
    image(home / "0.png", size=(200, 100))
    path = write_jsonl(home, [row(0, task="detection", answer="[[20.0, 10, 60, 20]]", options=None)])
    (case,) = build(path=path, box_frame="pixels")
    assert json.loads(case.answer) == [[100, 100, 300, 200]]
    path = write_jsonl(home, [row(0, task="detection", answer=[[20, 10, 201, 20]], options=None)])
    assert "0..1000" in problems_of(path=path, box_frame="pixels")[0]


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    corners=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_framed_boxes_stay_in_the_frame_and_have_an_area(width, height, corners):
    x1, x2 = sorted((round(corners[0] * (width - 1)), round(corners[1] * (width - 1))))
    y1, y2 = sorted((round(corners[2] * (height - 1)), round(corners[3] * (height - 1))))
    ((left, top, right, bottom),) = to_frame([(x1, y1, x2 + 1, y2 + 1)], width, height)
    assert 0 <= left < right <= 1000 and 0 <= top < bottom <= 1000
    # half a thousandth by rounding, one more where a thin box is widened
    assert abs(left - x1 * 1000 / width) <= 1.5 and abs(bottom - (y2 + 1) * 1000 / height) <= 1.5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4, unique=True))
def test_mask_boxes_are_those_drawn(tmp_path_factory, cells):
    mask = np.zeros((100, 100), np.int32)
    for number, (r, c) in enumerate(cells, start=1):
        mask[r * 10 : r * 10 + 10, c * 10 : c * 10 + 10] = number * 1000  # ids need not be dense
    path = tmp_path_factory.mktemp("mask") / "m.tif"
    Image.fromarray(mask).save(path)
    expected = sorted(([c * 100, r * 100, c * 100 + 100, r * 100 + 100] for r, c in cells), key=lambda b: (b[1], b[0]))
    assert boxes_from_mask(str(path), (100, 100)) == expected


def test_rows_say_whether_they_name_a_patient(home):
    for i in range(3):
        image(home / f"{i}.png", seed=i)
    rows = [["0.png", "a", "p1"], ["1.png", "b", ""], ["2.png", "a", "p2"]]
    path = write_csv(home, ["file", "label", "patient"], rows)
    cases = build(path=path, prompt="Which?")
    assert [(case.patient, case.patient_named) for case in cases] == [("p1", True), ("1", False), ("p2", True)]
    found = build(path=path, prompt="Which?", patient_pattern="^(.)")
    assert all(case.patient_named for case in found), "the file name says"


# ---- ms-swift


def swift(user="<image>\nWhich?", assistant=None, **columns):
    messages = [{"role": "user", "content": user}]
    if assistant is not None:
        messages.append({"role": "assistant", "content": assistant})
    return {"messages": messages, "images": [{"path": "0.png"}], **columns}


def test_swift_rows(home):
    image(home / "0.png")
    rows = [
        swift(assistant="<think>Glands are regular.</think><answer>(A) benign</answer>"),
        swift(solution="<prompt>Which?</prompt><max_token>512</max_token><answer>B</answer>"),
        swift(assistant="malignant", images=["0.png"]),
    ]
    # the same image with different answers, so each row has its own question
    rows[1]["messages"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "Which one?"}]
    rows[2]["messages"][0]["content"] = "Which is it?<image>"
    rows[2]["messages"].insert(0, {"role": "system", "content": "You are a pathologist."})
    (home / "sft.json").write_text(json.dumps(rows))
    cases = build(path=str(home / "sft.json"), task="choice", options=["benign", "malignant"])
    assert [case.answer for case in cases] == ["benign", "malignant", "malignant"]
    assert [case.prompt for case in cases] == ["Which?", "Which one?", "Which is it?"]
    assert cases[0].extra["rationale"] == "Glands are regular."
    assert cases[2].extra["system"] == "You are a pathologist."
    assert [case.id for case in cases] == ["sft:1", "sft:2", "sft:3"]


def test_swift_rows_that_cannot_be_one_question(home):
    image(home / "0.png")
    rows = [
        swift(user="<image><image>Which?", assistant="a"),
        swift(),
        swift(assistant="a", images=[{"bytes": "..."}]),
        {"messages": "Which?", "images": ["0.png"]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "images": ["0.png"]},
        {"messages": [{"role": "robot", "content": "a"}], "images": ["0.png"]},
    ]
    path = write_jsonl(home, rows)
    problems = problems_of(path=path, task="open")
    for number, words in [
        (1, "2 <image> in the prompt for 1 images"),
        (2, "no gold answer"),
        (3, "embedded images"),
        (4, "must be a list of"),
        (5, "one user turn"),
        (6, "role: system"),
    ]:
        assert any(p.startswith(f"{path}:{number}: ") and words in p for p in problems), words
    problems = problems_of(path=path)
    assert sum("`task` is missing" in problem for problem in problems) == len(rows)


# ---- every bad row, by file and line


def test_every_bad_row_is_reported_at_once(home):
    for i in (0, 1, 2, 3, 12):
        image(home / f"{i}.png", i)
    (home / "empty.png").touch()
    whole = image(home / "whole.png", 99, (64, 64)).read_bytes()
    (home / "short.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (64, 64)).save(home / "whole.jpg")
    jpeg = (home / "whole.jpg").read_bytes()
    (home / "short.jpg").write_bytes(jpeg[: len(jpeg) - 40])
    bad = {
        2: (row(0, answer="normal"), "not one of the options"),
        3: ("{not json", "not JSON"),
        4: (row(4), "no file '4.png'"),
        5: (row(5, images=["short.png"]), "cannot be decoded"),
        6: (row(6, images=["short.jpg"]), "cannot be decoded"),
        7: (row(7, images=["empty.png"]), "cannot be decoded"),
        8: (row(8, images=["../outside.png"]), "leads outside"),
        9: (row(9, task="quiz", options=None), "use one of choice"),  # and its image is missing
        10: (row(10, images=["1.png"], split="dev-set"), "`split` is 'dev-set'"),
        11: ([1, 2], "a list where a row"),
        12: ({"id": "only"}, "`patient` is missing"),
        13: (row(12, id="c1"), "the id 'c1' was already given at"),
        14: (row(14, images=["2.png"], patient=""), "`patient` is empty"),
    }
    rows = [row(1)] + [bad[number][0] for number in sorted(bad)]
    image(home.parent / "outside.png", 5)
    path = write_jsonl(home, rows)
    problems = problems_of(path=path, task="choice")
    for number, (_, words) in bad.items():
        assert any(p.startswith(f"{path}:{number}: ") and words in p for p in problems), (number, words, problems)
    assert not any(p.startswith(f"{path}:1: ") for p in problems)
    assert len(problems) == len(bad) + 4  # row 9 has a second problem, row 12 lacks three columns more


def test_a_lost_slide_is_a_warning_where_the_case_shows_something_else(home, caplog):
    for name in ("a.tif", "b.tif", "c.h5"):
        (home / name).write_bytes(name.encode())
    (home / "empty.tif").touch()
    image(home / "1.png")
    slides = [
        ["a.tif", "gone.tif"],
        ["gone.tif"],  # beside an image
        ["b.tif", "c.h5", "empty.tif"],
        ["a.tif", "empty.tif"],  # not the first case, with another answer
    ]
    rows = [row(i, images=["1.png"] if i == 1 else [], slides=each) for i, each in enumerate(slides)]
    rows[3]["answer"] = "malignant"
    path = write_jsonl(home, rows)
    cases = build(path=path)
    assert [[Path(p).name for p in case.slides] for case in cases] == slides, "every slide keeps its place"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("2 slides are left out, 4 cases go on")
    assert f"{home / 'gone.tif'} cannot be read" in warning and "the file is empty" in warning
    caplog.clear()
    check_cases(cases)
    assert [record.getMessage() for record in caplog.records] == [warning], "also without what was found before"


def test_cases_without_any_slide_are_named(home, caplog):
    (home / "a.tif").write_bytes(b"a")
    (home / "empty.tif").touch()
    outside = [row(3, images=[], slides=["a.tif", "../gone.tif"])]
    rows = [row(i, images=[], slides=each) for i, each in enumerate((["gone.tif", "lost.h5"], ["empty.tif"]))]
    path = write_jsonl(home, [*rows, row(2, images=["gone.png"], slides=["a.tif"]), *outside])
    problems = problems_of(path=path)
    for line, words in (
        (1, "no file 'gone.tif'"),
        (1, "no file 'lost.h5'"),
        (2, "is empty"),
        (3, "no file 'gone.png'"),
    ):
        assert any(p.startswith(f"{path}:{line}: ") and words in p for p in problems), (line, words, problems)
    assert any(p.startswith(f"{path}:4: ") and "leads outside" in p for p in problems)
    assert len(problems) == 5 and not caplog.records


def test_bad_rows_of_a_table(home):
    image(home / "0.png")
    path = home / "m.csv"
    path.write_text('file,label,split\n0.png,a,train\n0.png,a\n"x\ny.png",a,train\n,b,train\n0.png,,\n')
    problems = problems_of(path=str(path), prompt="?", labels={"a": "A", "c": "C"})
    assert [p.split(": ")[0].rsplit(":", 1)[1] for p in problems] == ["3", "4", "6", "7", "7"]
    for words, problem in zip(
        ["2 cells for 3", "no file 'x\\ny.png'", "`file` is empty", "`split` is empty", "`label` is empty"],
        problems,
        strict=True,
    ):
        assert words in problem


def test_row_numbers_of_json_and_parquet(home):
    image(home / "0.png")
    rows = [row(0), row(1, images=["gone.png"])]
    (home / "a.json").write_text("[\n" + json.dumps(rows[0]) + ",\n\n" + json.dumps(rows[1]) + "\n]")
    assert problems_of(path=str(home / "a.json"))[0].startswith(f"{home}/a.json:4: no file")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), home / "a.parquet")
    assert problems_of(path=str(home / "a.parquet"))[0].startswith(f"{home}/a.parquet: row 2: no file")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"id": 1}', "not a JSON array"),
        ("[{]", "not JSON"),
        ('[{"id": 1}', "not closed"),
        ('[{"id": 1} {}]', "not closed"),
    ],
)
def test_broken_json_is_named(home, text, words):
    (home / "a.json").write_text(text)
    with pytest.raises(InputError, match=words):
        build(path=str(home / "a.json"), task="open")


@given(
    st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.text()))), st.sampled_from([None, 1])
)
def test_json_entries_are_read_as_json_reads_them(tmp_path_factory, entries, indent):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(entries, indent=indent))
    rows, problems = read_rows(path)
    assert [r.values for r in rows] == entries and problems == []
    if indent and entries:
        assert rows[0].at.endswith(":2")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.xlsx", b"", "unknown kind of manifest"),
        ("a.csv", b"file,label\n\xff.png,a\n", "a.csv:2: not UTF-8"),
        ("a.jsonl", b'{"id": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.csv", b"file,file\nx,y\n", "empty or repeat"),
        ("a.csv", b'file,label\n"x,y\n', "not CSV"),
        ("a.csv", b"file,label\n", "no rows"),
        ("a.csv", b"picture,label\nx,y\n", "no column 'file'"),
        ("a.jsonl", b"\n", "no rows"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
    ],
)
def test_a_manifest_that_cannot_be_read(home, name, content, words):
    (home / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        build(path=str(home / name), prompt="?")


def test_missing_manifest_and_empty_folder(home):
    assert "no manifest" in problems_of(path=str(home / "gone.csv"))[0]
    (home / "set").mkdir()
    assert "no sub-folder" in problems_of(path=str(home / "set"), prompt="?")[0]
    (home / "set/a").mkdir()
    assert "no rows" in problems_of(path=str(home / "set"), prompt="?")[0]


@pytest.mark.parametrize(
    "params, words",
    [
        ({"format": "excel"}, "'format'"),
        ({"task": "vqa"}, "'task'"),
        ({"duplicates": "keep"}, "'duplicates'"),
        ({"need": ["dev"]}, "'need'"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, "leave train a part"),
        ({"limit": 0}, "limit is 0"),
        ({"patient_pattern": "("}, "not a regular expression"),
    ],
)
def test_bad_parameters(home, params, words):
    with pytest.raises(InputError, match=words):
        build(path=str(home / "x.csv"), **params)


# ---- paths and pictures that must not be trusted


def test_paths_stay_inside_unless_allowed(home):
    outside = image(home.parent / "outside.png")
    image(home / "in.png", 1)
    os.symlink(outside, home / "link.png")
    path = write_jsonl(home, [row(0, images=["link.png"]), row(1, images=[str(outside)]), row(2, images=["in.png"])])
    problems = problems_of(path=path)
    assert len(problems) == 2 and all("leads outside" in p and "allow_outside" in p for p in problems)
    assert len(build(path=path, allow_outside=True)) == 3
    assert len(build(path=path, root=str(home.parent), only={"id": "c1"})) == 1


def test_pixel_limit_is_checked_before_decoding(home):
    # A PNG that says 60,000 x 60,000 pixels: decoding it would take 10 GB.
    chunk = lambda kind, data: (  # noqa: E731
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    )
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (home / "0.png").write_bytes(data)
    path = write_jsonl(home, [row(0)])
    assert "give a whole slide under `slides`" in problems_of(path=path)[0]
    image(home / "0.png", size=(40, 40))
    assert "max_pixels = 1,000" in problems_of(path=path, max_pixels=1000)[0]
    build(path=path)
    # also when the size comes from the cache
    assert "max_pixels = 1,000" in problems_of(path=path, max_pixels=1000)[0]


def test_checked_files_are_remembered_until_they_change(home, monkeypatch):
    path = str(image(home / "0.png"))
    facts, problems = inspect_files([path])
    assert not problems and (facts[path].width, facts[path].height) == (16, 12)
    monkeypatch.setattr("frugalpath.envs.files._look", lambda *_: pytest.fail("decoded again"))
    assert inspect_files([path])[0] == facts
    monkeypatch.undo()
    Path(path).write_bytes(Path(path).read_bytes()[:60])
    assert "cannot be decoded" in inspect_files([path])[1][path]


def test_a_cache_that_cannot_be_written_costs_only_time(home, monkeypatch, caplog):
    (home / "blocked").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "blocked"))
    path = str(image(home / "0.png"))
    assert path in inspect_files([path])[0]
    assert "checked again" in caplog.text


# ---- the real sets


@pytest.mark.slow
@needs_data
def test_real_sets_load():
    pcam = build(path=str(DATA / "tiles/pcam/manifest.csv"), prompt="?", val_fraction=0.15, duplicates="drop")
    assert {case.split for case in pcam} == {"train", "val", "test"} and pcam[0].extra["mpp"] == 0.97
    glas = build(path=str(DATA / "fields/glas/manifest.csv"), prompt="?", val_fraction=0.15, mask_column="mask")
    assert len(glas) == 90 and all(json.loads(case.answer) for case in glas)
    crc = build(path=str(DATA / "tiles/crc-tissue"), prompt="?", val_fraction=0.1, test_fraction=0.2)
    assert len({case.answer for case in crc if case.split == "test"}) == 9


@needs_data
def test_the_real_copies_are_found():
    problems = problems_of(path=str(DATA / "tiles/pcam/manifest.csv"), prompt="?")
    assert len(problems) == 2 and all("in several splits" in p for p in problems)


# ---- the examples of the documentation


def examples():
    text = Path("docs/data.md").read_text()
    blocks = re.findall(r"<!-- example: (\S+) -->\n```\w*\n(.*?)```(?:\n\n```yaml\n(.*?)```)?", text, re.DOTALL)
    return {
        name: (content, yaml.safe_load(recipe or content)["cases"])
        for name, content, recipe in blocks
        if name != "mosaic"
    }


def test_the_documented_examples_load(home):
    for i in (1, 2):
        image(home / f"data/fields/{i}.png", i)
        image(home / f"data/tiles/{i}.png", i)
    for i in range(20):
        image(home / f"data/set/{['normal', 'tumour'][i % 2]}/{i}.png", i)
    for name in "ab":
        (home / "data/s").mkdir(exist_ok=True)
        (home / f"data/s/3{name}.svs").write_text(name)
    found = examples()
    assert set(found) == {"cases.jsonl", "labels.csv", "folder", "swift.jsonl"}
    for name, (content, params) in found.items():
        if name != "folder":
            (home / "data" / name).write_text(content)
        params.pop("name")
        # two rows cannot also fill a val split
        params = params | {"path": str(home / params["path"])} | ({"val_fraction": 0.0} if "." in name else {})
        cases = build(**params)
        assert len(cases) == {"cases.jsonl": 3, "folder": 20}.get(name, 2)
    assert cases[0].answer == "cancer"


def test_the_documented_parameters_exist():
    text = Path("docs/data.md").read_text()
    known = set(inspect.signature(build).parameters) | set(inspect.signature(mosaic.build).parameters)
    named = set(re.findall(r"`([a-z_]+): ", text)) | {key for _, params in examples().values() for key in params}
    assert named - {"name"} <= known


def test_a_protocol_file_is_relative_to_the_manifest(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png", seed=1)
    (tmp_path / "own.yaml").write_text("title: of the user\n")
    rows = [
        {
            "id": str(i),
            "patient": str(i),
            "task": "synoptic",
            "prompt": "Report.",
            "answer": "Grade: 2",
            "images": ["ab"[i] + ".png"],
            "protocol": name,
        }
        for i, name in enumerate(("own.yaml", "biopsy"))
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = read_manifest(tmp_path / "cases.jsonl")
    assert [case.protocol for case in cases] == [str(tmp_path / "own.yaml"), "biopsy"]
    rows[0]["protocol"] = "none.yaml"
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"none\.yaml"):
        read_manifest(tmp_path / "cases.jsonl")
