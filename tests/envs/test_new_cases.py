"""New cases: what they may leave out, and what is told about them."""

import json

import numpy as np
import pytest
from PIL import Image

from frugalpath.envs.new_cases import new_case, read_new_cases
from frugalpath.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def rows(folder, *values):
    path = folder / "new.jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return str(path)


def test_one_question_about_files(folder, monkeypatch):
    monkeypatch.chdir(folder)
    case = new_case(["a.png", "b.png"], [], "Tumour?", options=["yes", "no"], question="metastasis")
    assert case.images == (str(folder / "a.png"), str(folder / "b.png"))
    assert (case.task, case.answer, case.question, case.id) == ("choice", "", "metastasis", "a")
    assert new_case(["a.png"], [], "What is it?").task == "open"
    assert new_case(["a.png"], [], "Box it.", task="detection").problems(gold=False) == []


def test_all_that_is_wrong_with_a_question_is_told_at_once(folder):
    (folder / "c.png").write_text("no image")
    with pytest.raises(InputError) as told:
        new_case([str(folder / "c.png")], [str(folder / "a.svs")], " ", options=["yes"])
    assert len(told.value.problems) == 4
    assert "drop its row" not in str(told.value), "no manifest has a row of it"
    for word in ("c.png: cannot be decoded", "a.svs: cannot be read", "`prompt` is empty", "at least two"):
        assert word in str(told.value)


def test_rows_need_no_gold_answer_id_or_patient(folder):
    path = rows(
        folder,
        {"images": "a.png", "prompt": "Tumour?", "options": ["yes", "no"], "task": "choice"},
        {"id": "x", "images": "b.png", "task": "detection", "answer": [[0, 0, 10, 10]]},
    )
    first, second = read_new_cases(path, prompt="Box each gland.", task="choice")
    assert (first.id, first.patient, first.answer, first.prompt) == ("new:1", "a", "", "Tumour?")
    assert (second.id, second.prompt, second.answer) == ("x", "Box each gland.", "[[0, 0, 10, 10]]")


def test_a_recipe_says_what_a_row_of_labels_holds(folder):
    table = folder / "new.csv"
    params = {"path": "old.csv", "prompt": "Which?", "labels": {"T": "tumour", "N": "normal"}, "val_fraction": 0.2}
    table.write_text("file\na.png\nb.png\n")
    cases = read_new_cases(str(table), params)
    assert [(c.id, c.answer, c.options) for c in cases] == [
        ("a.png", "", ("tumour", "normal")),
        ("b.png", "", ("tumour", "normal")),
    ]
    table.write_text("file,label\na.png,T\nb.png,\n")
    assert [c.answer for c in read_new_cases(str(table), params)] == ["tumour", ""]
    # Labels that happen to stand in new rows are not the options of the question.
    del params["labels"]
    assert [c.options for c in read_new_cases(str(table), params)] == [None, None]
    assert [c.prompt for c in read_new_cases(str(table), params, prompt="Other?")] == ["Other?"] * 2


def test_boxes_and_masks_may_be_missing(folder):
    table = folder / "new.csv"
    table.write_text("file\na.png\n")
    (case,) = read_new_cases(str(table), {"prompt": "Box each gland.", "mask_column": "mask", "box_frame": "pixels"})
    assert (case.task, case.answer) == ("detection", "")
    path = rows(folder, {"images": "a.png", "prompt": "Box it.", "task": "detection"})
    assert read_new_cases(path, {"box_frame": "pixels"})[0].answer == ""


def test_swift_rows_need_no_answer(folder):
    path = rows(folder, {"messages": [{"role": "user", "content": "<image>Tumour?"}], "images": ["a.png"]})
    (case,) = read_new_cases(path, task="open")
    assert (case.prompt, case.answer) == ("Tumour?", "")


def test_bad_rows_are_told_together(folder):
    path = rows(
        folder,
        {"id": "x", "images": "a.png", "prompt": "?", "task": "choice", "options": ["a", "b"], "answer": "c"},
        {"id": "x", "images": "nowhere.png", "prompt": "?", "task": "open"},
        {"id": "x", "images": "b.png", "task": "open"},
        {"id": "y", "images": "b.png", "prompt": "?", "task": "open"},
        {"id": "y", "images": "a.png", "prompt": "?", "task": "open"},
    )
    with pytest.raises(InputError) as told:
        read_new_cases(path)
    for word in (
        "new.jsonl:1: `answer` 'c'",
        "new.jsonl:2",
        "nowhere.png",
        "new.jsonl:3: `prompt`",
        "'y' is given more",
    ):
        assert word in str(told.value)


def test_an_empty_manifest_is_refused(folder):
    with pytest.raises(InputError, match="no rows"):
        read_new_cases(rows(folder))
