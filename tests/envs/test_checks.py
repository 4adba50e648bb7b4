import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from frugalpath.envs.case import Case
from frugalpath.envs.checks import check_cases, drop_copies, select
from frugalpath.envs.files import inspect_files
from frugalpath.envs.manifest import build
from frugalpath.envs.splits import assign_splits, carve, limit_cases, together
from frugalpath.errors import InputError


@pytest.fixture
def pictures(tmp_path):
    """Twelve images of different content."""
    paths = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def case(i, picture, **change):
    values = {"id": f"c{i}", "patient": f"secret-{i}", "task": "choice", "prompt": "?", "answer": "a"}
    return Case(**values | {"options": ("a", "b"), "images": (picture,), "split": "train"} | change)


def problems_of(cases, **params):
    with pytest.raises(InputError) as error:
        check_cases(cases, **params)
    return error.value.problems


def test_good_cases_pass(pictures):
    check_cases([case(i, p, split=("train", "val", "test")[i % 3]) for i, p in enumerate(pictures)], need=["test"])


def test_a_patient_in_two_splits_is_named_by_rows_only(pictures):
    cases = [case(i, p, patient="secret", split="train" if i < 8 else "test") for i, p in enumerate(pictures)]
    (problem,) = problems_of(cases, where=[f"m.csv:{i + 2}" for i in range(12)])
    assert "one patient is in several splits" in problem and "put all its rows in one split" in problem
    assert "test: m.csv:10, m.csv:11" in problem and "train: m.csv:2" in problem and "and 2 more" in problem
    assert "secret" not in problem


def test_copies_in_two_splits_are_found_by_content(pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "copy.png")
    cases = [case(0, pictures[0]), case(1, str(tmp_path / "copy.png"), split="test"), case(2, pictures[2])]
    (problem,) = problems_of(cases)
    assert "in several splits" in problem and "case 'c0'" in problem and "case 'c1'" in problem
    facts, _ = inspect_files(path for c in cases for path in c.images)
    assert drop_copies(cases, facts) == [False, True, True]


def test_slides_are_compared_too(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"one")
    (tmp_path / "b.svs").write_bytes(b"one")
    cases = [
        case(i, "", images=(), slides=(str(tmp_path / f"{n}.svs"),), split=s)
        for i, (n, s) in enumerate([("a", "train"), ("b", "val")])
    ]
    assert "one image or slide" in problems_of(cases)[0]


@pytest.mark.parametrize(
    "task, text, shared",
    [
        ("open", "Invasive carcinoma of the breast", True),
        ("open", "no tumour", False),
        ("synoptic", "II", True),
        ("choice", "a", False),
    ],
)
def test_a_report_in_two_splits(pictures, task, text, shared):
    options = ("a", "b") if task == "choice" else None
    cases = [
        case(0, pictures[0], task=task, answer=text, options=options),
        case(
            1, pictures[1], task=task, answer=f"  {text.upper()}\n" if shared else text, options=options, split="test"
        ),
    ]
    if not shared:
        return check_cases(cases)
    (problem,) = problems_of(cases)
    assert "one report text is in several splits" in problem and text not in problem
    check_cases(cases, allow_shared_text=True)


def test_contradictions_and_repeated_ids(pictures):
    cases = [case(0, pictures[0]), case(1, pictures[0], answer="b"), case(1, pictures[1])]
    problems = problems_of(cases)
    assert len(problems) == 2
    assert "already given" in problems[0] and "different answers" in problems[1]
    check_cases([case(0, pictures[0]), case(1, pictures[0], answer="b", prompt="Another question?")])


def test_problems_of_cases_and_files_come_together(pictures, tmp_path):
    cases = [
        case(0, pictures[0], answer="c"),
        case(1, str(tmp_path / "gone.png")),
        case(2, pictures[2], patient=""),
        case(3, pictures[3], split="test", patient="secret-0"),
    ]
    problems = problems_of(cases, need=["train", "val"])
    assert len(problems) == 5
    assert "no cases in the split 'val' (present: test 1, train 3)" in problems[-1]


def test_no_cases():
    assert "there are no cases" in problems_of([])[0]


def test_select(pictures):
    cases = [case(0, pictures[0]), case(1, pictures[1], split="test")]
    assert select(cases, "test") == cases[1:]
    with pytest.raises(InputError, match=r"no cases in the split 'val' .*val_fraction"):
        select(cases, "val")


# ---- splits


ROWS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc")), min_size=1, max_size=60)


@given(rows=ROWS, val=st.floats(0.05, 0.4), test=st.floats(0.0, 0.4), seed=st.integers(0, 5), shuffle=st.randoms())
def test_splits_never_divide_a_unit_and_do_not_depend_on_order(rows, val, test, seed, shuffle):
    fractions = {"train": 1 - val - test, "val": val, "test": test}
    units, strata = zip(*rows, strict=True)
    chosen = dict(zip(rows, assign_splits(units, strata, fractions, seed=seed), strict=True))
    by_unit = {}
    for (unit, _), split in chosen.items():
        by_unit.setdefault(unit, set()).add(split)
    assert all(len(splits) == 1 for splits in by_unit.values())
    again = list(rows)
    shuffle.shuffle(again)
    units, strata = zip(*again, strict=True)
    assert dict(zip(again, assign_splits(units, strata, fractions, seed=seed), strict=True)) == chosen


@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(20, 200), min_size=1),
    val=st.sampled_from([0.1, 0.15, 0.25]),
    seed=st.integers(0, 3),
)
def test_single_units_are_spread_over_the_answers(sizes, val, seed):
    strata = [answer for answer, n in sizes.items() for _ in range(n)]
    chosen = assign_splits(range(len(strata)), strata, {"train": 1 - val, "val": val}, seed=seed)
    held = Counter(answer for answer, split in zip(strata, chosen, strict=True) if split == "val")
    for answer, n in sizes.items():
        assert abs(held[answer] - val * n) < 2


def test_another_seed_gives_another_split_and_answers_that_are_all_different_still_split():
    units = [f"p{i}" for i in range(200)]
    first, other = (assign_splits(units, units, {"train": 0.8, "val": 0.2}, seed=seed) for seed in (0, 1))
    assert first != other and first.count("val") == other.count("val") == 40


def test_few_large_patients_come_close():
    sizes = {"p2": 20, "p4": 18, "p11": 16, "p5": 8, "p6": 4, "p13": 3, "p16": 2, "p8": 1, "p14": 1}
    units = [name for name, n in sizes.items() for _ in range(n)]
    chosen = assign_splits(units, ["x"] * len(units), {"train": 0.85, "val": 0.15}, seed=0)
    assert 8 <= chosen.count("val") <= 14


@given(st.lists(st.lists(st.integers(0, 8), max_size=3), max_size=15))
def test_groups_share_keys_and_nothing_else(keys):
    groups = together(keys)
    for i, own in enumerate(keys):
        for j, other in enumerate(keys):
            if set(own) & set(other):
                assert groups[i] == groups[j]
    for group in set(groups):
        members = [set(keys[i]) for i in range(len(keys)) if groups[i] == group]
        reached, rest = members[0], members[1:]
        while near := [m for m in rest if m & reached]:
            rest = [m for m in rest if not m & reached]
            reached = reached.union(*near)
        assert not rest


def test_carving_keeps_patients_copies_and_reports_together(pictures, tmp_path):
    shutil.copy(pictures[0], tmp_path / "copy.png")
    report = "Invasive carcinoma of the breast"
    cases = [case(i, p) for i, p in enumerate(pictures)]
    cases.append(case(12, str(tmp_path / "copy.png")))
    cases += [case(13, pictures[3], task="open", options=None, answer=report, patient="secret-3")]
    cases += [case(14, pictures[4], task="open", options=None, answer=report, patient="secret-4")]
    facts, _ = inspect_files(path for c in cases for path in c.images)
    for seed in range(20):
        split = [c.split for c in carve(cases, facts, 0.2, 0.2, seed)]
        assert split[0] == split[12] and split[3] == split[4] == split[13] == split[14]
        assert {"train", "val", "test"} == set(split)


def test_what_is_split_already_is_not_carved(pictures):
    cases = [case(i, p, split=("train", "val")[i % 2]) for i, p in enumerate(pictures)]
    carved = carve(cases, {}, 0.5, 0.25, 0)
    assert [c for c in carved if c.split == "val"] == [c for c in cases if c.split == "val"]
    assert sum(c.split == "test" for c in carved) in (1, 2)


def test_limit_is_spread_over_answers_and_splits(pictures):
    cases = [
        case(i, p, answer="a" if i < 8 else "b", split="test" if i in (0, 11) else "train")
        for i, p in enumerate(pictures)
    ]
    kept = [cases[i] for i in limit_cases(cases, range(12), 4, 0)]
    assert Counter((c.split, c.answer) for c in kept) == {
        ("train", "a"): 2,
        ("train", "b"): 2,
        ("test", "a"): 1,
        ("test", "b"): 1,
    }
    assert limit_cases(cases, [3, 4], 4, 0) == [3, 4]


def test_fractions_that_leave_a_split_empty_are_an_error(tmp_path):
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red" if label == "a" else "blue").save(tmp_path / "set" / label / "same-patient.png")
    with pytest.raises(InputError, match="no cases in the split 'test'"):
        build(path=str(tmp_path / "set"), prompt="?", test_fraction=0.2)
