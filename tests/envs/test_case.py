import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.envs.case import FIELDS, SPLITS, Case, parse_boxes
from frugalpath.envs.registry import BUILT_IN, find_env, make_env
from frugalpath.errors import InputError

ROW = {"id": "a", "patient": "p", "task": "choice", "prompt": "Which?", "answer": "yes", "images": ["/x.png"]}
TEXT = st.text(min_size=1).filter(str.strip)
SIDES = st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True).map(sorted)
BOXES = st.lists(st.tuples(SIDES, SIDES).map(lambda s: [s[0][0], s[1][0], s[0][1], s[1][1]]), max_size=5)


@given(
    id=TEXT,
    patient=TEXT,
    prompt=TEXT,
    options=st.lists(TEXT, min_size=2, max_size=4, unique_by=lambda s: s.strip().casefold()),
    images=st.lists(TEXT, min_size=1, max_size=3),
    split=st.sampled_from(SPLITS),
    extra=st.dictionaries(st.text(min_size=1).filter(lambda k: k not in FIELDS), st.integers() | TEXT, max_size=3),
)
def test_a_case_survives_its_row_and_json(id, patient, prompt, options, images, split, extra):
    case = Case(
        id=id,
        patient=patient,
        task="choice",
        prompt=prompt,
        answer=options[0],
        images=tuple(images),
        options=tuple(options),
        split=split,
        extra=extra,
    )
    again = Case.from_dict(json.loads(json.dumps(case.to_dict())))
    assert again == case
    assert again.extra == extra
    assert hash(again) == hash(case)


def test_question_defaults_to_the_task():
    assert Case.from_dict(ROW).question == "choice"
    assert Case.from_dict(ROW | {"question": "grade"}).question == "grade"


@pytest.mark.parametrize("value, text", [(4, "4"), (4.0, "4"), (0.5, "0.5"), ("04", "04")])
def test_numbers_of_a_table_become_text(value, text):
    assert Case.from_dict(ROW | {"patient": value}).patient == text


def test_empty_cells_are_missing_columns():
    case = Case.from_dict(ROW | {"options": None, "protocol": float("nan"), "extra_column": None})
    assert case.options is None and case.protocol is None and case.extra == {}


def test_a_structured_answer_becomes_json_text():
    detection = Case.from_dict(ROW | {"task": "detection", "answer": [[0, 0, 10, 10]]})
    assert json.loads(detection.answer) == [[0, 0, 10, 10]]
    synoptic = Case.from_dict(ROW | {"task": "synoptic", "answer": {"grade": "II"}, "protocol": "breast"})
    assert json.loads(synoptic.answer) == {"grade": "II"}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"id": None}, "`id` is missing"),
        ({"patient": " "}, "`patient` is empty"),
        ({"task": "vqa"}, "use one of choice"),
        ({"split": "trian"}, "use one of train"),
        ({"answer": ""}, "`answer` is empty"),
        ({"answer": ["yes"]}, "must be text"),
        ({"prompt": {"text": "Which?"}}, "must be text"),
        ({"images": []}, "no `images` and no `slides`"),
        ({"images": {"path": "x.png"}}, "must be a list"),
        ({"options": ["no", "maybe"]}, "not one of the options"),
        ({"options": ["yes"]}, "at least two"),
        ({"options": ["yes", "Yes "]}, "repeat an entry"),
        ({"options": "yes"}, "must be a list"),
        ({"task": "open", "options": ["yes", "no"]}, "only `choice` has options"),
    ],
)
def test_each_bad_row_says_what_is_wrong(change, words):
    with pytest.raises(InputError, match=words):
        Case.from_dict(ROW | change)


def test_all_that_is_wrong_with_a_row_is_said_at_once():
    with pytest.raises(InputError) as error:
        Case.from_dict(ROW | {"prompt": "", "split": "x", "options": ["no", "maybe"]})
    assert len(error.value.problems) == 3


def test_extra_may_not_hide_a_column():
    case = Case("a", "p", "open", "Why?", "so", images=("x.png",), extra={"answer": "other"})
    assert "rename them" in case.problems()[0]


@given(BOXES)
def test_boxes_are_read_back(boxes):
    assert parse_boxes(json.dumps(boxes)) == [tuple(box) for box in boxes]


@pytest.mark.parametrize(
    "text",
    ["", "none", "{}", "[1, 2, 3, 4]", "[[1, 2, 3]]", "[[1, 2, 3, true]]", '[["1", 2, 3, 4]]', "[[0, 0, 1001, 5]]"],
)
def test_what_is_no_list_of_boxes_is_refused(text):
    with pytest.raises(ValueError, match=r"JSON list|four numbers|0\.\.1000"):
        parse_boxes(text)


@pytest.mark.parametrize(
    "text",
    ["[[5, 0, 5, 9]]", "[[9, 0, 5, 9]]", "[[-1, 0, 5, 9]]", "[[0, 0, NaN, 5]]", "[[0, 0, 1e999, 5]]"],
)
def test_boxes_outside_the_frame_or_without_area_are_refused(text):
    with pytest.raises(ValueError, match=r"0\.\.1000"):
        parse_boxes(text)


# ---- the registry


def test_built_in_names_resolve():
    for name in BUILT_IN:
        assert callable(find_env(name))


def test_a_function_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from frugalpath.envs.case import Case\n"
        "def two(*, n: int = 2):\n"
        "    return [Case(str(i), str(i), 'open', 'Why?', 'so', images=('x.png',)) for i in range(n)]\n"
        "def wrong():\n"
        "    return ['a case']\n"
    )
    assert [case.id for case in make_env(f"{file}:two", {"n": 3})] == ["0", "1", "2"]
    with pytest.raises(InputError, match="must return a list"):
        make_env(f"{file}:wrong")
    with pytest.raises(InputError, match="no function 'three'"):
        make_env(f"{file}:three")


def test_a_file_of_the_users_own_may_define_dataclasses(tmp_path, monkeypatch):
    """They look up the module that they stand in, which a file that was executed outside of sys.modules has not."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from frugalpath.envs.case import Case\n"
        "@dataclass\n"
        "class Slide:\n"
        "    name: str\n"
        "def one():\n"
        "    return [Case(Slide('a').name, 'p', 'open', 'Why?', 'so', images=('x.png',))]\n"
    )
    assert make_env(f"{tmp_path}/recipes/mine.py:one")[0].id == "a"
    assert make_env("mine.py:one", base=tmp_path / "recipes")[0].id == "a", "beside the recipe"
    monkeypatch.chdir(tmp_path / "recipes")
    assert make_env("mine.py:one", base=tmp_path)[0].id == "a", "or where one starts from"


@pytest.mark.parametrize(
    "name, params, words",
    [
        ("manifets", {}, "unknown environment"),
        ("manifest", {"path": "x.csv", "lables": {}}, "did you mean 'labels'"),
        ("manifest", {}, "needs the parameter 'path'"),
        ("no_such_module:build", {}, "no module 'no_such_module'"),
        ("no_such_file.py:build", {}, r"no file .*no_such_file\.py"),
        ("json:no_such_function", {}, "no function"),
    ],
)
def test_a_wrong_name_or_parameter_is_named(name, params, words):
    with pytest.raises(InputError, match=words):
        make_env(name, params)


def test_a_package_missing_inside_the_users_module_is_not_called_a_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        find_env("users_module:build")
