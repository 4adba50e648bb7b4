import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from frugalpath.envs.case import parse_boxes
from frugalpath.envs.files import inspect_files
from frugalpath.envs.manifest import read_manifest
from frugalpath.envs.mosaic import build
from frugalpath.envs.mosaic_cases import QUESTIONS
from frugalpath.envs.mosaic_layout import KINDS, Region, draw_layouts
from frugalpath.errors import InputError
from frugalpath.rewards.registry import get_reward

DATA = Path("../shared/data/tiles/pcam/manifest.csv")
SIDE = 16
COLOURS = {"normal": (60, 60, 200), "tumour": (200, 40, 60), "fat": (230, 230, 230)}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """90 noisy tiles of three colours, with a train and a test split and resolution, one of them copied across."""
    folder = tmp_path_factory.mktemp("tiles")
    rows = []
    for number in range(90):
        label, split = list(COLOURS)[number % 3], "train" if number < 60 else "test"
        noise = np.random.default_rng(number).integers(-20, 20, (SIDE, SIDE, 3))
        Image.fromarray(np.clip(noise + COLOURS[label], 0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append([f"{number}.png", label, f"p{number}", 0.5, split])
    (folder / "copy.png").write_bytes((folder / "89.png").read_bytes())
    rows.append(["copy.png", "fat", "p900", 0.5, "train"])
    with open(folder / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file", "label", "patient", "mpp", "split"], *rows])
    return folder


def make(tiles, folder, **change):
    params = {"tiles": str(tiles / "manifest.csv"), "folder": str(folder), "background": "normal", "lesion": "tumour"}
    params |= {"mosaics": {"train": 30, "test": 20}, "tile_px": SIDE, "grid": 7, "region_tiles": [2, 3]}
    return build(**params | change)


def truth(folder):
    return [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tiles, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosaic") / "fields"
    return folder, make(tiles, folder, mosaics={"train": 60, "val": 20, "test": 40})


# ---- layouts


@given(grid=st.integers(5, 12), low=st.integers(1, 3), extra=st.integers(0, 2), seed=st.integers(0, 99))
def test_layouts_say_what_they_show(grid, low, extra, seed):
    sides = (min(low, (grid - 1) // 2), min(low + extra, grid // 2))
    layouts = draw_layouts(20, grid, sides, ["n"], ["t"], [seed])
    assert Counter(layout.kind for layout in layouts) == {kind: round(20 * share) for kind, share in KINDS.items()}
    for layout in layouts:
        regions = layout.regions
        assert len(regions) == int(layout.kind[-1]) if layout.kind.startswith("focal") else not regions
        painted = np.zeros((grid, grid), int)
        for r in regions:
            assert sides[0] <= min(r.height, r.width) and max(r.height, r.width) <= sides[1]
            assert min(r.row, r.column) >= 0 and max(r.row + r.height, r.column + r.width) <= grid
            # grown by a tile to every side, a region still meets no other
            grown = painted[max(0, r.row - 1) : r.row + r.height + 1, max(0, r.column - 1) : r.column + r.width + 1]
            assert not grown.any()
            painted[r.row : r.row + r.height, r.column : r.column + r.width] = 1
        if layout.kind != "diffuse":
            assert (layout.lesion == painted.astype(bool)).all()
        else:
            assert layout.area >= 0.7 - 1 / grid**2
        boxes = np.array(layout.boxes()).reshape(-1, 4)
        covered = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum() / 1e6
        assert layout.kind == "diffuse" or abs(covered - layout.area) < 0.01


def test_quadrant_of_the_centre():
    def quadrant(*region, grid=6):
        lesion = np.zeros((grid, grid), bool)
        layout = draw_layouts(1, grid, (1, 2), ["n"], ["t"], [0])[0]
        return type(layout)("focal-1", (Region(*region),), lesion, "n", "t").quadrant

    assert quadrant(0, 0, 2, 2) == "upper left"
    assert quadrant(0, 4, 2, 2) == "upper right"
    assert quadrant(3, 1, 3, 2) == "lower left"
    assert quadrant(2, 2, 3, 3) == "lower right"
    assert quadrant(2, 0, 2, 2) is None  # centred on the midline


# ---- what is written


def test_boxes_match_the_pixels(made, tiles):
    folder, _ = made
    checked = 0
    for row in truth(folder):
        with Image.open(folder / row["file"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        side = len(pixels)
        assert side == 7 * SIDE
        red = (pixels[..., 0] > pixels[..., 2]).reshape(7, SIDE, 7, SIDE).mean((1, 3)) > 0.5
        assert abs(red.mean() - row["area"]) < 1e-3
        if row["mosaic"] != "diffuse":
            painted = np.zeros((7, 7), bool)
            for x1, y1, x2, y2 in np.round(np.array(row["boxes"]).reshape(-1, 4) * 7 / 1000).astype(int):
                painted[y1:y2, x1:x2] = True
            assert (painted == red).all()
            checked += len(row["boxes"])
    assert checked > 50


def test_no_tile_is_in_two_splits(made, tiles):
    folder, _ = made
    facts, _ = inspect_files(str(path) for path in tiles.glob("*.png"))
    used = {split: set() for split in ("train", "val", "test")}
    for row in truth(folder):
        used[row["split"]] |= {facts[str(tiles / name)].digest for name in row["tiles"]}
    assert all(used.values())
    assert not used["train"] & used["test"] and not used["train"] & used["val"] and not used["val"] & used["test"]


def test_answers_are_true_and_each_equally_frequent(made):
    folder, cases = made
    rows = {row["file"]: row for row in truth(folder)}
    for split in ("train", "val", "test"):
        for question in QUESTIONS:
            asked = [case for case in cases if (case.split, case.question) == (split, question)]
            classes = Counter(str(len(parse_boxes(c.answer))) if question == "boxes" else c.answer for c in asked)
            assert len(classes) >= 2 and len(set(classes.values())) == 1, (split, question, classes)
    for case in cases:
        row = rows[str(Path(case.images[0]).relative_to(folder))]
        assert case.extra["area"] == row["area"] and case.extra["mosaic"] == row["mosaic"]
        if case.question == "boxes":
            assert json.loads(case.answer) == row["boxes"]
        elif case.question == "count":
            assert case.answer == str(len(row["boxes"]))
        elif case.question == "presence":
            assert case.answer == ("yes" if row["area"] else "no")
        elif case.question == "quadrant":
            assert case.answer == (row["quadrant"] or "none") and len(row["boxes"]) == (row["quadrant"] is not None)
        else:
            assert case.answer == ("tumour" if row["area"] > 0.5 and row["mosaic"] == "diffuse" else "normal")


def test_diagnosis_is_the_tissue_of_most_tiles(made):
    _, cases = made
    for case in cases:
        if case.question == "diagnosis" and case.extra["area"] != 0.5:
            assert case.answer == ("tumour" if case.extra["area"] > 0.5 else "normal")


def test_the_kind_of_a_mosaic_shows_in_nothing_but_its_pixels(made):
    _, cases = made
    prompts = {question: {case.prompt for case in cases if case.question == question} for question in QUESTIONS}
    assert all(len(texts) == 1 for texts in prompts.values())
    kinds = [
        case.extra["mosaic"] for case in cases if case.split == "train" and case.question in ("count", "presence")
    ]
    assert kinds != sorted(kinds) and len(set(kinds[: len(kinds) // 4])) >= 3


def test_gold_boxes_score_one(made):
    _, cases = made
    boxes = [case.answer for case in cases if case.question == "boxes"]
    reward = get_reward("ap50")
    completions = [[{"role": "assistant", "content": f"<think></think><answer>{text}</answer>"}] for text in boxes]
    assert reward(completions, answer=boxes, task=["detection"] * len(boxes)) == [1.0] * len(boxes)


def test_the_folder_is_a_manifest_too(made):
    folder, cases = made
    assert read_manifest(folder / "cases.jsonl") == cases


# ---- the same again, continued, or refused


def test_same_parameters_same_bytes_whatever_the_number_of_threads(tiles, tmp_path):
    first = make(tiles, tmp_path / "a", workers=1)
    make(tiles, tmp_path / "b", workers=3)
    for file in sorted((tmp_path / "a").rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()
    assert [case.answer for case in make(tiles, tmp_path / "c", seed=1)] != [case.answer for case in first]


def test_a_half_written_folder_is_completed_and_a_whole_one_used_again(tiles, tmp_path):
    whole = make(tiles, tmp_path / "a")
    files = sorted((tmp_path / "a/fields").rglob("*.jpg"))
    content = {file: file.read_bytes() for file in files}
    for file in files[::3]:
        file.unlink()
    (tmp_path / "a/cases.jsonl").unlink()
    kept = {file: os.stat(file).st_mtime_ns for file in files if file.exists()}
    assert make(tiles, tmp_path / "a") == whole
    assert {file: file.read_bytes() for file in files} == content
    assert {file: os.stat(file).st_mtime_ns for file in kept} == kept
    assert not list((tmp_path / "a").rglob("*.part"))
    assert {case.question for case in make(tiles, tmp_path / "a", questions=["count"])} == {"count"}


def test_other_parameters_or_files_are_refused(tiles, tmp_path):
    make(tiles, tmp_path / "a")
    with pytest.raises(InputError, match=r"grid \(7 there, 8 now\).*give another folder"):
        make(tiles, tmp_path / "a", grid=8)
    with pytest.raises(InputError, match=r"seed \(0 there, 2 now\)"):
        make(tiles, tmp_path / "a", seed=2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.doc").touch()
    with pytest.raises(InputError, match="holds no mosaics"):
        make(tiles, tmp_path / "b")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "video"}, "kind is 'video'"),
        ({"mosaics": {"dev": 3}}, "dev: 3"),
        ({"mosaics": {}}, "is empty"),
        ({"mosaics": {"train": 2}}, "too few"),
        ({"questions": ["grade"]}, "unknown question 'grade'"),
        ({"questions": []}, "questions is empty"),
        ({"lesion": "normal"}, "all different"),
        ({"lesion": "melanoma"}, "no tile with the label 'melanoma' in the split 'train'"),
        ({"region_tiles": [2, 6]}, "region_tiles"),
        ({"region_tiles": [3]}, "region_tiles"),
        ({"grid": 0}, "grid is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"quality": 0}, "quality is 0"),
        ({"label_column": "class"}, "no column 'class'"),
    ],
)
def test_bad_parameters_leave_nothing_behind(tiles, tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        make(tiles, tmp_path / "a", **change)
    assert not (tmp_path / "a").exists()


def test_tiles_that_are_not_square_or_have_no_resolution(tmp_path):
    for label, size in (("a", (16, 16)), ("b", (16, 8))):
        for i in range(8):
            path = tmp_path / "set" / label / f"{label}{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 50 + i).convert("RGB").save(path)
    params = {"tiles": str(tmp_path / "set"), "folder": str(tmp_path / "out"), "background": "a", "lesion": "b"}
    with pytest.raises(InputError, match="tiles of a mosaic are square"):
        build(**params, mosaics={"train": 20})
    for path in (tmp_path / "set/b").iterdir():
        Image.open(path).resize((16, 16)).save(path)
    with pytest.raises(InputError, match="set mpp"):
        build(**params, mosaics={"train": 20}, kind="slide")
    # a folder of classes has no splits of its own: they are taken by fraction
    cases = build(**params, mosaics={"train": 20, "test": 20}, test_fraction=0.25, tile_px=8)
    assert {case.split for case in cases} == {"train", "test"} and "mpp" not in cases[0].extra


# ---- slides, several tissues, real tiles


@pytest.mark.slow
def test_slides_are_pyramids_with_resolution_and_glass(tiles, tmp_path):
    cases = make(tiles, tmp_path / "s", kind="slide", grid=20, region_tiles=[3, 5], tile_px=32, questions=["boxes"])
    rows = {str(tmp_path / "s" / row["file"]): row for row in truth(tmp_path / "s")}
    case = next(case for case in cases if case.extra["regions"] == 2)
    assert case.images == () and case.prompt.endswith("in this slide.")
    with openslide.OpenSlide(case.slides[0]) as slide:
        assert slide.dimensions == (22 * 32, 22 * 32) and slide.level_count >= 2
        # tiles of 16 px at 0.5 mpp are shown at 32 px
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25, rel=1e-3)
        assert case.extra["mpp"] == 0.25
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    assert (pixels[:30] > 230).all() and (pixels[:, -30:] > 230).all()
    for x1, y1, x2, y2 in np.array(rows[case.slides[0]]["boxes"]) * 22 * 32 / 1000:
        inside = pixels[int(y1) + 4 : int(y2) - 4, int(x1) + 4 : int(x2) - 4]
        assert (inside[..., 0] > inside[..., 2]).mean() > 0.95


def test_several_tissues_around_the_lesion(tiles, tmp_path):
    cases = make(tiles, tmp_path / "a", background=["normal", "fat"], lesion_name="cancer", mosaics={"train": 80})
    diagnoses = Counter(case.answer for case in cases if case.question == "diagnosis")
    assert set(diagnoses) == {"normal", "fat", "tumour"} and len(set(diagnoses.values())) == 1
    assert next(case for case in cases if case.question == "diagnosis").options == ("normal", "fat", "tumour")
    assert next(case for case in cases if case.question == "presence").prompt == "Does this field show any cancer?"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="the real sets are not here")
def test_real_tiles(tmp_path):
    cases = build(
        tiles=str(DATA),
        folder=str(tmp_path / "m"),
        background="normal",
        lesion="metastasis",
        mosaics={"train": 20, "test": 20},
    )
    with Image.open(cases[0].images[0]) as image:
        assert image.size == (768, 768)
    assert cases[0].extra["mpp"] == 0.97
    assert {case.split for case in cases} == {"train", "test"}
