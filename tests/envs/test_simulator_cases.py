"""Cases of several simulated slides: what they are made of, what is asked, and that nothing gives the answer away."""

import json
from collections import Counter, defaultdict

import pytest

from frugalpath.envs.checks import check_cases
from frugalpath.envs.simulator import build, cohort
from frugalpath.envs.simulator_cases import CASE_QUESTIONS, PROTOCOL, ask_case, compose_cases
from frugalpath.envs.splits import assign_splits
from frugalpath.errors import InputError
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol

SMALL = {"size_mm": 0.5, "mpp": 4.0, "workers": 2, "val_fraction": 0.0, "test_fraction": 0.4}


def cases_of(slides, size, seed=0):
    specs = cohort(slides, seed)
    shares = {"train": 0.6, "val": 0.1, "test": 0.3}
    strata = [f"{spec.diagnosis} {spec.grade}" for spec in specs]
    splits = assign_splits([spec.patient for spec in specs], strata, shares, seed=seed)
    return specs, splits, compose_cases(specs, splits, size, seed)


def truth_of(diagnosis, grade=None, quadrant="upper left"):
    lesion = diagnosis != "normal"
    return {
        "diagnosis": diagnosis,
        "grade": grade,
        "size_mm": 0.3 if lesion else None,
        "foci": 1,
        "area_mm2": 0.1,
        "quadrant": quadrant if lesion else None,
        "margin_mm": 0.3 if lesion else None,
        "necrosis": False,
        "mitoses": 0,
        "mitoses_per_mm2": 0.0,
    }


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_slide_is_in_one_case_at_most_and_keeps_its_split(size):
    specs, splits, units = cases_of(600, size)
    used = [i for unit in units for i in unit.slides]
    assert len(set(used)) == len(used) > 0.5 * len(specs)
    assert all(splits[i] == unit.split for unit in units for i in unit.slides)
    assert all(len(unit.slides) == size for unit in units)
    assert len({unit.name for unit in units}) == len(units)
    assert all(unit.patient == unit.name for unit in units)
    assert cases_of(600, size)[2] == units, "the same for every run"
    assert cases_of(600, size, seed=1)[2] != units


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_answer_can_be_had_without_looking(size):
    specs, _, units = cases_of(1200, size)
    answers, texts = defaultdict(Counter), defaultdict(set)
    for unit in units:
        truths = [truth_of(specs[i].diagnosis, specs[i].grade) for i in unit.slides]
        for kind in CASE_QUESTIONS:
            if (asked := ask_case(kind, truths, 0.9)) is not None:
                texts[kind].add((asked.prompt, asked.options))
                if asked.options:
                    answers[unit.split, kind][asked.answer] += 1
                    assert asked.answer in asked.options
    assert all(len(found) == 1 for found in texts.values()), "text and options are the same for all cases"
    highest = {"case_diagnosis": 0.61, "case_grade": 0.45, "which_slide": 1 / size + 0.1, "carcinoma_slides": 0.42}
    for (split, kind), counts in answers.items():
        if split == "train":
            assert max(counts.values()) <= highest[kind] * counts.total(), (kind, counts)
            options = next(iter(texts[kind]))[1]
            assert set(counts) == set(options)


def test_grade_and_place_of_the_only_carcinoma_are_independent():
    for size in (2, 3, 4):
        specs, _, units = cases_of(1200, size)
        found = Counter()
        for unit in units:
            grades = [specs[i].grade for i in unit.slides]
            if sum(grade is not None for grade in grades) == 1 and unit.split == "train":
                place = next(i for i, grade in enumerate(grades) if grade)
                found[place, grades[place]] += 1
        assert len(found) == 3 * size and max(found.values()) - min(found.values()) <= 1


@pytest.mark.parametrize(
    ("slides", "expected"),
    [
        (["normal"] * 3, ("normal", None, None, "0", None)),
        (["normal", "adenoma", "normal"], ("adenoma", None, None, "0", "Diagnosis: adenoma")),
        (["adenoma", "adenoma", "normal"], ("adenoma", None, None, "0", None)),
        (["adenoma", 2, "normal"], ("carcinoma", "grade 2", "slide 2", "1", "Diagnosis: carcinoma\nGrade: 2")),
        ([1, "normal", 3], ("carcinoma", "grade 3", None, "2", "Diagnosis: carcinoma\nGrade: 3")),
        ([3, 3, 3], ("carcinoma", "grade 3", None, "3", None)),
    ],
)
def test_answers_follow_from_the_slides(slides, expected):
    truths = [truth_of("carcinoma", slide) if isinstance(slide, int) else truth_of(slide) for slide in slides]
    for kind, answer in zip(CASE_QUESTIONS, expected, strict=True):
        asked = ask_case(kind, truths, 0.9)
        if kind == "case_synoptic" and answer:
            assert asked.answer.startswith(answer)
            assert not parse_report(asked.answer, load_protocol(PROTOCOL)).problems
        else:
            assert (asked.answer if asked else None) == answer


def test_an_unclear_quadrant_is_not_reported():
    truths = [truth_of("carcinoma", 2, quadrant=None), truth_of("normal")]
    assert ask_case("case_synoptic", truths, 0.9) is None


@pytest.mark.slow
def test_cases_and_single_slides_share_a_folder(tmp_path):
    single = build(folder=str(tmp_path), slides=40, **SMALL)
    cases = build(folder=str(tmp_path), slides=40, slides_per_case=2, **SMALL)
    check_cases(cases, need=("train", "test"), allow_shared_text=True)
    assert {case.question for case in cases} == set(CASE_QUESTIONS)
    split = {case.slides[0]: case.split for case in single}
    known = {case.slides[0]: json.loads(case.extra["truth"]) for case in single}
    for case in cases:
        assert [split[path] for path in case.slides] == [case.split] * 2
        assert json.loads(case.extra["truth"]) == [known[path] for path in case.slides]
        if case.question == "which_slide":
            assert known[case.slides[int(case.answer[-1]) - 1]]["diagnosis"] == "carcinoma"
        if case.question == "carcinoma_slides":
            assert case.answer == str(sum(known[path]["diagnosis"] == "carcinoma" for path in case.slides))
    few = build(folder=str(tmp_path), slides=40, slides_per_case=2, questions_per_slide=1, **SMALL)
    assert len(few) == len({case.slides for case in cases})
    some = build(folder=str(tmp_path), slides=40, slides_per_case=2, questions=["which_slide"], **SMALL)
    assert some == [case for case in cases if case.question == "which_slide"]
    assert build(folder=str(tmp_path), slides=40, **SMALL) == single
    both = build(folder=str(tmp_path), slides=40, slides_per_case=2, questions=["which_slide", "grade"], **SMALL)
    assert both == [*some, *(case for case in single if case.question == "grade")]


def test_what_cannot_be_asked_or_composed(tmp_path):
    with pytest.raises(InputError, match="unknown question 'worst' with slides_per_case 2; use case_diagnosis"):
        build(folder=str(tmp_path / "a"), slides=10, slides_per_case=2, questions=["worst"], **SMALL)
    with pytest.raises(InputError, match="unknown question 'which_slide' with slides_per_case 1; use diagnosis"):
        build(folder=str(tmp_path / "a"), slides=10, questions=["which_slide"], **SMALL)
    with pytest.raises(InputError, match="slides_per_case is 0"):
        build(folder=str(tmp_path / "a"), slides=10, slides_per_case=0, **SMALL)
    with pytest.raises(InputError, match="10 slides leave the split 'train' empty of whole cases; ask for more"):
        build(folder=str(tmp_path / "a"), slides=10, slides_per_case=6, **SMALL)
    assert not (tmp_path / "a").exists()
