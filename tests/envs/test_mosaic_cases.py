"""Cases of several mosaics: whole, even in their answers, true, and apart from the mosaics asked about one by one."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from frugalpath.envs.checks import check_cases
from frugalpath.envs.manifest import read_manifest
from frugalpath.envs.mosaic import build
from frugalpath.envs.mosaic_cases import CASE_QUESTIONS, case_options
from frugalpath.envs.mosaic_layout import case_kinds
from frugalpath.errors import InputError

SIDE = 16
COLOURS = {"normal": (60, 60, 200), "tumour": (200, 40, 60)}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Forty tiles of two colours in a folder of classes."""
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(40):
        label = list(COLOURS)[number % 2]
        path = folder / ("train" if number < 28 else "test") / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(-20, 20, (SIDE, SIDE, 3))
        Image.fromarray(np.clip(noise + COLOURS[label], 0, 255).astype(np.uint8)).save(path)
    return folder


def make(tiles, folder, **change):
    params = {"tiles": str(tiles), "folder": str(folder), "background": "normal", "lesion": "tumour", "mpp": 0.5}
    params |= {"mosaics": {"train": 74, "test": 40}, "tile_px": SIDE, "grid": 5, "region_tiles": [2, 2]}
    return build(**params | {"slides_per_case": 3} | change)


@pytest.fixture(scope="module")
def made(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosaic") / "fields"
    return folder, make(tiles, folder)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_one_third_of_the_cases_has_no_lesion_and_one_third_one(size):
    n = 30 * size
    kinds = np.array(case_kinds(n, size, (1,))).reshape(n, size)
    lesions = (kinds != "none").sum(1)
    assert (lesions == 0).sum() == (lesions == 1).sum() == n / 3
    several = Counter(lesions[lesions > 1].tolist())
    assert set(several) == set(range(2, size + 1)) and max(several.values()) - min(several.values()) <= 1
    places = Counter(np.argmax(kinds[lesions == 1] != "none", axis=1).tolist())
    assert set(places.values()) == {10}
    assert len(set(kinds[lesions > 0].ravel())) == 5, "every kind of mosaic"


def test_answers_are_true_and_each_equally_frequent(made):
    folder, cases = made
    rows = {row["file"]: row for row in map(json.loads, (folder / "truth.jsonl").read_text().splitlines())}
    assert Counter(row["split"] for row in rows.values()) == {"train": 72, "test": 39}, "whole cases only"
    answers, texts = defaultdict(Counter), defaultdict(set)
    for case in cases:
        assert len(case.images) == 3 and not case.slides
        holds = [rows[str(Path(path).relative_to(folder))]["mosaic"] != "none" for path in case.images]
        expected = {
            "case_presence": "yes" if any(holds) else "no",
            "which_slide": f"field {holds.index(True) + 1}" if sum(holds) == 1 else None,
            "lesion_slides": str(sum(holds)),
        }
        assert case.answer == expected[case.question]
        assert case.options == case_options(case.question, 3, "field")
        answers[case.split, case.question][case.answer] += 1
        texts[case.question].add(case.prompt)
    assert {question for _, question in answers} == set(CASE_QUESTIONS)
    assert all(len(found) == 1 for found in texts.values()), "the text tells nothing"
    for counts in answers.values():
        assert len(counts) >= 2 and len(set(counts.values())) == 1
    assert set(answers["train", "lesion_slides"]) == {"0", "1", "2", "3"}
    assert texts["which_slide"] == {"Which of these fields shows tumour?"}


def test_pixels_show_the_lesion_where_the_answer_says(made):
    _, cases = made
    asked = [case for case in cases if case.question == "which_slide"]
    for case in asked:
        pixels = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in case.images]
        seen = [bool((each[..., 0] > each[..., 2]).mean() > 0.05) for each in pixels]
        assert seen == [case.answer == f"field {i + 1}" for i in range(3)]
    assert len(asked) == 9


def test_cases_of_slides_are_read_by_openslide_and_from_their_manifest(tiles, tmp_path):
    cases = make(tiles, tmp_path / "slides", kind="slide", slides_per_case=2, mosaics={"train": 24})
    assert {case.question for case in cases} == set(CASE_QUESTIONS)
    assert all(len(case.slides) == 2 and not case.images for case in cases)
    with openslide.OpenSlide(cases[0].slides[1]) as slide:
        assert slide.dimensions == (7 * SIDE, 7 * SIDE)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
    assert {case.prompt for case in cases if case.question == "which_slide"} == {"Which of these slides shows tumour?"}
    read = read_manifest(tmp_path / "slides/cases.jsonl")
    assert [(c.id, c.answer, c.slides, c.options) for c in read] == [
        (c.id, c.answer, c.slides, c.options) for c in cases
    ]
    check_cases(cases)


def test_the_folder_is_used_again_and_by_no_other_size(made, tiles, tmp_path):
    folder, cases = made
    check_cases(cases, need=("train", "test"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")}
    assert make(tiles, folder) == cases
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.jpg")} == before
    assert make(tiles, folder, questions=["which_slide"]) == [c for c in cases if c.question == "which_slide"]
    with pytest.raises(InputError, match="slides_per_case"):
        make(tiles, folder, slides_per_case=2, mosaics={"train": 72, "test": 39})
    single = make(tiles, tmp_path / "single", slides_per_case=1, mosaics={"train": 30})
    assert "slides_per_case" not in json.loads((tmp_path / "single/mosaic.json").read_text())
    assert not {case.id for case in single} & {case.id for case in cases}


def test_single_mosaics_are_asked_about_beside_their_cases(made, tiles):
    home, cases = made
    both = make(tiles, home, questions=["presence", *CASE_QUESTIONS])
    assert [case for case in both if case.question != "presence"] == cases
    single = [case for case in both if case.question == "presence"]
    assert {len((*case.images, *case.slides)) for case in single} == {1}
    split = {path: case.split for case in cases for path in (*case.images, *case.slides)}
    assert all(split.get(path, case.split) == case.split for case in single for path in (*case.images, *case.slides))


def test_what_cannot_be_asked(tiles, tmp_path):
    with pytest.raises(InputError, match="unknown question 'many' with slides_per_case 3; use case_presence"):
        make(tiles, tmp_path / "a", questions=["many"])
    with pytest.raises(InputError, match="unknown question 'which_slide' with slides_per_case 1; use diagnosis"):
        make(tiles, tmp_path / "a", questions=["which_slide"], slides_per_case=1)
    with pytest.raises(InputError, match="slides_per_case is 0"):
        make(tiles, tmp_path / "a", slides_per_case=0)
    with pytest.raises(InputError, match=r"3 train mosaics are too few.*18 are enough"):
        make(tiles, tmp_path / "a", mosaics={"train": 4})
    assert not (tmp_path / "a").exists()
