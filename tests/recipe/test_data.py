"""Cases run on the slides that have features, say which have none, and are errors where nothing is left."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.evaluation.report.writing import missing_slides
from frugalpath.recipe.data import check_questions, load_rewards
from frugalpath.recipe.features import load_features
from frugalpath.recipe.run import EncoderConfig
from frugalpath.recipe.sft import Stage
from frugalpath.slides.store import Features, read_features, write_features
from tests.conftest import grid_features, noise
from tests.slides.conftest import tissue_image, write_slide

ENCODER = {"mpp": 1.0, "tile_px": 64, "cells": 1, "slide": {"qc": False}}


def case(name: str, *slides: Path, images: tuple[Path, ...] = ()) -> Case:
    return Case(
        id=name,
        patient=name,
        task="open",
        prompt="What is it?",
        answer="nothing",
        slides=tuple(map(str, slides)),
        images=tuple(map(str, images)),
    )


def load(cases: list[Case], folder: Path, **changes):
    return load_features(cases, EncoderConfig(**{**ENCODER, **changes}), folder / "out")


@pytest.fixture
def stored(tmp_path) -> dict[str, Path]:
    """Feature files: two sound ones, and one for each thing that can be wrong."""
    files = {name: tmp_path / f"{name}.h5" for name in ("a", "b", "gone", "text", "empty", "wide", "bare", "nan")}
    write_features(files["a"], grid_features(2, 2))
    write_features(files["b"], grid_features(3, 2))
    files["text"].write_text("no HDF5")
    write_features(files["empty"], Features(np.zeros((0, 8)), np.zeros((0, 2)), {"patch_size": 32}))
    write_features(files["wide"], Features(np.zeros((2, 9)), np.zeros((2, 2)), {"patch_size": 32}))
    write_features(files["bare"], Features(np.zeros((1, 8)), np.zeros((1, 2))))
    write_features(files["nan"], Features(np.full((2, 8), np.nan), np.zeros((2, 2)), {"patch_size": 32}))
    return files


REASONS = {
    "gone": "no such feature file",
    "text": "cannot be read as HDF5",
    "empty": "holds no patch",
    "wide": "its features are 9 wide, those of the others 8",
    "bare": "states no patch size",
    "nan": "NaN or infinite",
}


def test_feature_files_that_cannot_be_used_are_left_out_with_one_warning(stored, tmp_path, caplog):
    cases = [case(name, stored["a"], stored[name]) for name in REASONS] + [case("sound", stored["b"], stored["a"])]
    with caplog.at_level(logging.WARNING, "frugalpath.recipe.data"):
        bank = load(cases, tmp_path)
    assert set(bank.files) == {str(stored["a"]), str(stored["b"])}
    assert set(bank.missing) == {str(stored[name]) for name in REASONS}
    (record,) = caplog.records
    assert record.getMessage().startswith("6 slides give no features; 6 cases go on with what else they show: ")
    for name, reason in REASONS.items():
        assert reason in bank.missing[str(stored[name])]
        assert f"{stored[name]}: {bank.missing[str(stored[name])]}" in record.getMessage()
    assert bank.dim == 8


def test_cases_with_nothing_left_are_named_with_their_slides(stored, tmp_path):
    cases = [case("sound", stored["a"]), case("lost", stored["gone"], stored["empty"]), case("torn", stored["text"])]
    with pytest.raises(InputError) as caught:
        load([*cases, cases[1]], tmp_path)  # repeated, as `balance` does
    lost, torn = caught.value.problems
    assert lost.startswith("case lost: nothing is left") and "drop the case" in lost
    for name in ("gone", "empty"):
        assert f"{stored[name]}: " in lost and REASONS[name] in lost
    assert torn.startswith("case torn: ") and REASONS["text"] in torn


@pytest.mark.slow
def test_strict_makes_every_failure_an_error(stored, tmp_path):
    cases = [case(name, stored["a"], stored[name]) for name in ("gone", "empty")]
    with pytest.raises(InputError) as caught:
        load(cases, tmp_path, strict=True)
    assert [problem.split(": ")[0] for problem in caught.value.problems] == [
        str(stored["gone"]),
        str(stored["empty"]),
    ]
    assert load([case("sound", stored["a"], stored["b"])], tmp_path, strict=True).missing == {}


def test_files_of_two_encoders_in_equal_number_are_refused(stored, tmp_path):
    with pytest.raises(InputError, match=r"a\.h5 and .*wide\.h5: as many feature files are 8 wide as 9"):
        load([case("one", stored["a"], stored["wide"])], tmp_path)


@pytest.mark.slow
def test_slides_that_cannot_be_extracted_are_left_out(tmp_path, caplog):
    sound = write_slide(tmp_path / "sound.tif", tissue_image(300, 300))
    blank = write_slide(tmp_path / "blank.tif", np.full((300, 300, 3), 243, np.uint8))
    unknown = write_slide(tmp_path / "unknown.tif", tissue_image(300, 300), None)
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"no slide")
    picture, wide = tmp_path / "picture.png", tmp_path / "wide.h5"
    noise(64, 64, 0).save(picture)
    write_features(wide, Features(np.zeros((2, 9)), np.zeros((2, 2)), {"patch_size": 32}))
    cases = [
        case("a", sound, blank, unknown),
        case("b", tmp_path / "gone.tif", broken, images=(picture,)),
        case("c", blank, sound, wide),
    ]
    with caplog.at_level(logging.WARNING, "frugalpath.recipe.data"):
        bank = load(cases, tmp_path)
    assert set(bank.files) == {str(sound), str(picture)}
    width = read_features(bank.files[str(sound)]).features.shape[1]
    reasons = {Path(slide).name: reason for slide, reason in bank.missing.items()}
    assert reasons.keys() == {"blank.tif", "unknown.tif", "gone.tif", "broken.svs", "wide.h5"}
    assert "no tissue" in reasons["blank.tif"] and "unknown scale" in reasons["unknown.tif"]
    assert reasons["wide.h5"] == f"its features are 9 wide, those of the others {width}"
    assert len(caplog.records) == 1 and "5 slides give no features; 3 cases" in caplog.text
    rows = missing_slides([*cases, cases[0]], bank.missing)
    assert {Path(row["slide"]).name: row["cases"] for row in rows} == {
        "blank.tif": 2,
        "unknown.tif": 1,
        "gone.tif": 1,
        "broken.svs": 1,
        "wide.h5": 1,
    }
    assert all(row["reason"] == bank.missing[row["slide"]] for row in rows)
    with pytest.raises(InputError) as caught:
        load([*cases, case("d", blank, broken)], tmp_path)
    (problem,) = caught.value.problems
    assert problem.startswith("case d: ") and str(blank) in problem and str(broken) in problem


def test_a_gold_answer_need_not_score_1_under_what_only_shapes(tmp_path):
    (tmp_path / "mine.py").write_text("def brief(completions):\n    return [0.0 for _ in completions]\n")
    asked = [replace(case("a"), task="choice", options=("nothing", "tumour"))]
    for scores, refused in ((True, True), (False, False)):
        specs = ["choice", {"name": "mine.py:brief", "weight": 0.2, "scores": scores}]
        run = SimpleNamespace(rewards=specs, base=tmp_path, ladder=[1, 4])
        with pytest.raises(InputError, match="set `scores: false`") if refused else nullcontext():
            assert [r.name for r in load_rewards(run, asked)] == ["choice", "brief"]


def test_kinds_of_question_that_no_case_asks_are_named_before_anything_runs():
    stages = [
        Stage("align", "sft_align", {"questions": ["report", "grad"]}),
        Stage("case", "sft", {"questions": "grade"}),
    ]
    with pytest.raises(InputError) as caught:
        check_questions(SimpleNamespace(questions=["grade", "size"], sft=stages), {"report", "grade"})
    assert caught.value.problems == [
        "questions: no case asks size; there are grade, report",
        "sft.align.questions: no case asks grad; there are grade, report",
        "sft.case.questions: 'grade': give a list, [grade]",
    ]
    check_questions(SimpleNamespace(questions=None, sft=stages[:0]), {"grade"})
