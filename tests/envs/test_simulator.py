"""Simulated slides: what is drawn is what the truth says, the same for every run, and no answer leaks."""

import json
import shutil
from collections import Counter, defaultdict

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from skimage.color import separate_stains
from skimage.measure import label, regionprops

from frugalpath.envs import histology, simulator_folder
from frugalpath.envs.case import Case
from frugalpath.envs.checks import check_cases
from frugalpath.envs.manifest import read_manifest
from frugalpath.envs.registry import make_env
from frugalpath.envs.simulator import build, cohort, main
from frugalpath.envs.simulator_cases import PROTOCOL, QUESTIONS, ask, synoptic
from frugalpath.envs.specimen import inked_edge, make_plan
from frugalpath.envs.stain import draw_stain, to_rgb
from frugalpath.errors import InputError
from frugalpath.rewards.detection import parse_boxes, valid
from frugalpath.rewards.registry import gold_completion
from frugalpath.rewards.synoptic.check import check_record
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.text import bleu4, meteor, rouge_l

SMALL = {"size_mm": 0.5, "mpp": 4.0, "workers": 1, "val_fraction": 0.0, "test_fraction": 0.0}


def specimen(number: int, diagnosis: str = "carcinoma", grade: int | None = 3, size_mm: float = 0.9):
    grade = grade if diagnosis == "carcinoma" else None
    return histology.make_specimen((5, number), size_mm=size_mm, diagnosis=diagnosis, grade=grade)


def picture(spec, mpp: float = 2.0) -> np.ndarray:
    side = round(spec.plan.size_um / mpp)
    return histology.draw(spec, mpp, (0, 0, side, side))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Slides in the size of the demo, drawn by two processes."""
    folder = tmp_path_factory.mktemp("made")
    return folder, build(folder=str(folder), slides=8, val_fraction=0.0, test_fraction=0.4)


def test_openslide_opens_the_slides(made):
    _, cases = made
    for path in sorted({case.slides[0] for case in cases}):
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (896, 896)
            assert slide.level_downsamples == (1.0, 2.0, 4.0)
            assert float(slide.properties["openslide.mpp-x"]) == 1.0
            thumbnail = np.asarray(slide.read_region((0, 0), 2, (224, 224)).convert("RGB"), float)
        glass = thumbnail.min(-1) > 215
        assert 0.03 < glass.mean() < 0.45
        assert glass[:3].mean() > 0.9


def test_the_file_shows_the_drawing(made):
    folder, _ = made
    row = json.loads((folder / "truth.jsonl").read_text().splitlines()[0])
    spec = cohort(8, 0)[0]
    drawn = histology.draw(
        histology.make_specimen((0, 0), size_mm=0.896, diagnosis=spec.diagnosis, grade=spec.grade),
        1.0,
        (0, 0, 896, 896),
    )
    with openslide.OpenSlide(folder / row["slide"]) as slide:
        seen = np.asarray(slide.read_region((0, 0), 0, (896, 896)).convert("RGB"), float)
    assert np.abs(seen - drawn).mean() < 6


def test_cases_are_whole_and_checked(made):
    _, cases = made
    check_cases(cases, need=("train", "test"), allow_shared_text=True)
    assert {case.question for case in cases} <= set(QUESTIONS)
    for case in cases:
        truth = json.loads(case.extra["truth"])
        if case.question == "diagnosis":
            assert case.answer == truth["diagnosis"]
        if case.question == "margin":
            assert case.answer == truth["margin_status"]
    by_slide = defaultdict(set)
    for case in cases:
        by_slide[case.slides].add(case.patient)
    assert all(len(patients) == 1 for patients in by_slide.values())


@pytest.mark.slow
def test_the_same_seed_draws_the_same_slides(tmp_path, made):
    folder, _ = made
    again = build(folder=str(tmp_path / "again"), slides=2, workers=1, val_fraction=0.0, test_fraction=0.0)
    for path in sorted({case.slides[0] for case in again}):
        name = path.rsplit("/", 1)[-1]
        assert (tmp_path / "again/slides" / name).read_bytes() == (folder / "slides" / name).read_bytes()
    other = histology.make_specimen((1, 0), size_mm=0.896, diagnosis="carcinoma", grade=3)
    assert not np.array_equal(picture(other), picture(specimen(0, size_mm=0.896)))


def test_blocks_fit_without_a_seam():
    spec = specimen(1, grade=1)
    whole = histology.draw(spec, 1.0, (0, 0, 900, 900))
    for box in ((0, 0, 300, 200), (411, 187, 301, 299), (600, 640, 300, 260)):
        left, top, width, height = box
        assert np.array_equal(histology.draw(spec, 1.0, box), whole[top : top + height, left : left + width])
    strip = histology.draw_strip(spec, 0.5, 640, 64, 1800)
    assert strip.shape == (64, 1800, 3)
    assert np.array_equal(strip[:, 1000:1100], histology.draw(spec, 0.5, (1000, 640, 100, 64)))


@pytest.mark.parametrize("grade", [1, 2, 3])
def test_tumour_and_crypts_look_different(grade):
    """Lesions hold far more haematoxylin than the tissue around them; glass holds no stain."""
    spec = specimen(10 + grade, grade=grade)
    side = round(spec.plan.size_um / 2)
    h, e, _ = histology.draw_amounts(spec, 2.0, (0, 0, side, side))
    lesion = histology.sample(spec.plan.nests, spec.plan.cell, 2.0, (0, 0, side, side)) > 0
    tissue = histology.sample(spec.plan.tissue, spec.plan.cell, 2.0, (0, 0, side, side))
    host = (tissue > 30) & ~ndimage.binary_dilation(lesion, iterations=15)
    assert h[lesion].mean() > 2 * h[host].mean()
    assert e[host].mean() > 0.3
    assert h[tissue < -20].max() == 0
    assert e[tissue < -20].max() == 0


def test_stains_separate_again():
    """Colour deconvolution of the picture gives the planted amounts back."""
    spec = specimen(3)
    side = round(spec.plan.size_um / 2)
    amounts = histology.draw_amounts(spec, 2.0, (0, 0, side, side))
    rgb = picture(spec).astype(float)
    density = -np.log(np.clip(rgb, 1, None) / spec.stain.white)
    found = density.reshape(-1, 3) @ np.linalg.pinv(spec.stain.matrix[:2].astype(float))
    clean = (amounts[2] == 0) & (rgb.min(-1) > 25) & (rgb.max(-1) < 250)
    for i, strength in enumerate(spec.stain.strength):
        planted = amounts[i] * strength
        error = found[:, i].reshape(side, side) - planted
        assert np.abs(np.median(error[clean])) < 0.02
        assert np.corrcoef(found[:, i].reshape(side, side)[clean], planted[clean])[0, 1] > 0.97


def test_stain_model_is_inverted_exactly():
    """Without noise the inverse is exact up to rounding to 8 bits; skimage's deconvolution is the second opinion."""
    stain = draw_stain(np.random.default_rng(0))
    h, e = np.meshgrid(np.linspace(0, 1.2, 30, dtype=np.float32), np.linspace(0, 1.0, 30, dtype=np.float32))
    rgb = to_rgb(stain, (h, e, np.zeros_like(h)), np.zeros_like(h))
    stains = np.vstack([stain.matrix[:2], np.cross(stain.matrix[0], stain.matrix[1])])
    # skimage scales densities by -log(1e-6).
    found = separate_stains(rgb / stain.white, np.linalg.inv(stains.astype(float))) * -np.log(1e-6)
    assert np.abs(found[..., 0] - h * stain.strength[0]).max() < 0.05
    assert np.abs(found[..., 1] - e * stain.strength[1]).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_truth_is_what_the_shapes_measure(number):
    spec = specimen(20 + number, ("carcinoma", "adenoma")[number % 2], 1)
    plan, truth = spec.plan, spec.truth
    mask = plan.lesion > 0
    assert not (mask & (plan.tissue <= 0)).any()
    assert not ((plan.necrosis > 0) & ~mask).any()
    assert not ((plan.nests > 0) & ~mask).any()
    parts = regionprops(label(mask, connectivity=2))
    assert len(parts) == truth.foci
    frame = 1000 / len(mask)
    boxes = sorted([p.bbox[1] * frame, p.bbox[0] * frame, p.bbox[3] * frame, p.bbox[2] * frame] for p in parts)
    np.testing.assert_allclose(sorted(truth.boxes), boxes, atol=0.51)
    cell = plan.cell / 1000
    assert truth.size_mm == pytest.approx(max(part.feret_diameter_max for part in parts) * cell, abs=1.5 * cell)
    assert truth.area_mm2 == pytest.approx(mask.sum() * cell**2)
    edge = np.argwhere(inked_edge(plan.tissue, plan.ink))
    nearest = min(np.hypot(*(edge - point).T).min() for point in np.argwhere(mask)) * cell
    assert truth.margin_mm == pytest.approx(nearest, abs=1e-6)
    assert truth.necrosis_mm2 == pytest.approx((plan.necrosis > 0).sum() * cell**2)
    if truth.quadrant is not None:
        y, x = (np.argwhere(mask) < len(mask) / 2).T
        upper, left = truth.quadrant.split()
        assert ((y == (upper == "upper")) & (x == (left == "left"))).mean() >= 0.42


def test_truth_is_what_the_pixels_show():
    """Ink and tumour found by colour lie as far apart as the truth says."""
    for number in range(40, 52):
        spec = specimen(number)
        if spec.truth.margin_mm > 0.02:
            break
    side = round(spec.plan.size_um / 2)
    h, _, ink = histology.draw_amounts(spec, 2.0, (0, 0, side, side))
    sheet = ndimage.gaussian_filter(h, 4) > 0.8
    sheet = ndimage.binary_opening(sheet, iterations=8)
    tissue = histology.sample(spec.plan.tissue, spec.plan.cell, 2.0, (0, 0, side, side)) > 0
    inked = ndimage.binary_dilation(ink > 0.3, iterations=2) & ~ndimage.binary_erosion(tissue) & tissue
    distance = ndimage.distance_transform_edt(~inked)[sheet].min() * 2 / 1000
    assert distance == pytest.approx(spec.truth.margin_mm, abs=0.03)


def test_mitoses_are_counted_as_drawn():
    for number in range(60, 66):
        spec = specimen(number, grade=1 + number % 3)
        drawn = spec.anatomy.cells.get("mitosis")
        assert spec.truth.mitoses == (0 if drawn is None else len(drawn.xy))


def test_no_answer_leaks_through_the_look():
    """Stain, ink and tissue are drawn apart from the truth: the same look for every diagnosis of a seed."""
    looks = []
    for diagnosis, grade in (("normal", None), ("adenoma", None), ("carcinoma", 1), ("carcinoma", 3)):
        spec = specimen(7, diagnosis, grade)
        looks.append((spec.stain.ink, *spec.stain.strength, *spec.stain.white, spec.turn, *spec.offset))
        looks[-1] += (float((spec.plan.tissue > 0).mean()), float(spec.plan.ink.sum()))
    assert all(look == looks[0] for look in looks)


@pytest.mark.slow
def test_amount_of_tumour_does_not_tell_its_size():
    by_size = defaultdict(list)
    for number in range(90):
        plan = histology.make_plan(np.random.default_rng([9, number]), size_mm=0.9, diagnosis="carcinoma", grade=3)
        size = ask("size", plan.truth.as_dict(), 0.9).answer
        # Whole glands and cells fit where the nests are deeper than a cell.
        by_size[size].append(float((plan.nests > 12).mean()))
    means = [np.mean(values) for values in by_size.values()]
    assert len(means) == 3
    assert max(means) < 1.12 * min(means)


@pytest.mark.slow
def test_options_are_balanced():
    answers, options = defaultdict(Counter), {}
    for number, spec in enumerate(cohort(180, 3)):
        plan = make_plan(np.random.default_rng([3, number]), size_mm=0.9, diagnosis=spec.diagnosis, grade=spec.grade)
        for kind in QUESTIONS:
            if (asked := ask(kind, plan.truth.as_dict(), 0.9)) is not None and asked.options:
                options[kind] = set(asked.options)
                answers[kind][asked.answer] += 1
    assert set(answers) == set(QUESTIONS) - {"boxes", "synoptic", "report"}
    for kind, counts in answers.items():
        assert max(counts.values()) <= 0.62 * counts.total(), (kind, counts)
        assert set(counts) == options[kind]


@pytest.mark.slow
def test_patients_stay_in_one_split_and_diagnoses_spread(tmp_path):
    cases = build(folder=str(tmp_path), slides=40, **SMALL | {"val_fraction": 0.2, "test_fraction": 0.3})
    check_cases(cases, need=("train", "val", "test"), allow_shared_text=True)
    share = Counter(case.split for case in cases if case.question == "diagnosis")
    assert share.total() == 40
    assert 9 <= share["test"] <= 15
    assert {c.answer for c in cases if c.question == "diagnosis" and c.split == "test"} == {
        "normal",
        "adenoma",
        "carcinoma",
    }


def test_an_interrupted_build_is_continued(tmp_path, monkeypatch):
    whole = build(folder=str(tmp_path / "whole"), slides=5, **SMALL)
    drawn = []
    original = simulator_folder.draw_slide

    def stop_at_third(root, spec, *params):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(spec.index)
        return original(root, spec, *params)

    monkeypatch.setattr(simulator_folder, "draw_slide", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        build(folder=str(tmp_path / "torn"), slides=5, **SMALL)
    assert not (tmp_path / "torn/truth.jsonl").exists()
    # The last row was cut off while it was written: its slide is drawn again.
    journal = tmp_path / "torn/truth.part.jsonl"
    journal.write_text(journal.read_text()[:-20])
    (tmp_path / "torn/slides/s00003.tif.1.1.part").write_bytes(b"left over")
    monkeypatch.setattr(simulator_folder, "draw_slide", original)
    continued = build(folder=str(tmp_path / "torn"), slides=5, **SMALL)
    assert drawn == [0, 1, 2]
    assert [case.answer for case in continued] == [case.answer for case in whole]
    names = sorted(path.relative_to(tmp_path / "torn").as_posix() for path in (tmp_path / "torn").rglob("*"))
    assert names == sorted(path.relative_to(tmp_path / "whole").as_posix() for path in (tmp_path / "whole").rglob("*"))
    for path in (tmp_path / "whole").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "torn" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_complete_folder_is_used_again(tmp_path, monkeypatch):
    first = build(folder=str(tmp_path), slides=3, **SMALL)
    monkeypatch.setattr(simulator_folder, "draw_slide", None)
    assert build(folder=str(tmp_path), slides=3, **SMALL) == first
    assert {case.question for case in build(folder=str(tmp_path), slides=2, questions=["size"], **SMALL)} <= {"size"}


def test_a_lost_slide_is_drawn_again_and_more_can_be_added(tmp_path):
    first = build(folder=str(tmp_path), slides=3, **SMALL)
    lost = tmp_path / "slides/s00001.tif"
    content = lost.read_bytes()
    lost.unlink()
    longer = build(folder=str(tmp_path), slides=5, **SMALL)
    assert lost.read_bytes() == content
    assert longer[: len(first)] == first
    assert len({case.slides for case in longer}) == 5


def test_other_parameters_are_refused(tmp_path):
    build(folder=str(tmp_path / "a"), slides=1, **SMALL)
    with pytest.raises(InputError, match=r"seed 0 \(now 1\), mpp 4.0 \(now 2.0\).*another folder"):
        build(folder=str(tmp_path / "a"), slides=1, **SMALL | {"seed": 1, "mpp": 2.0})
    (tmp_path / "a/params.json").write_text("{")
    with pytest.raises(InputError, match=r"params.json.*delete"):
        build(folder=str(tmp_path / "a"), slides=1, **SMALL)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt.*empty or a new folder"):
        build(folder=str(tmp_path / "b"), slides=1, **SMALL)
    with pytest.raises(InputError, match="is a file"):
        build(folder=str(tmp_path / "b/notes.txt"), slides=1, **SMALL)


def test_all_wrong_parameters_are_named_at_once(tmp_path):
    wrong = {"slides": 0, "size_mm": 0.1, "mpp": 50, "questions": ["diagnosis", "colour"], "workers": True}
    with pytest.raises(InputError) as caught:
        build(folder=str(tmp_path / "x"), **wrong, val_fraction=-1, questions_per_slide=0)
    text = str(caught.value)
    for name in ("slides is 0", "size_mm", "mpp", "'colour'", "workers", "val_fraction", "questions_per_slide"):
        assert name in text
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="nothing to train on"):
        build(folder=str(tmp_path / "x"), val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(InputError, match="split 'val' empty"):
        build(folder=str(tmp_path / "x"), slides=2, val_fraction=0.1, test_fraction=0.1)


@pytest.mark.parametrize(
    ("truth", "sentence"),
    [
        (("normal", None, None, False), "Normal."),
        (("adenoma", None, "lower right", False), "Adenoma, mostly in the lower right quadrant."),
        (
            ("carcinoma", 2, "upper left", True),
            "Carcinoma, grade 2, mostly in the upper left quadrant, with necrosis.",
        ),
        (
            ("carcinoma", 1, "upper right", False),
            "Carcinoma, grade 1, mostly in the upper right quadrant, without necrosis.",
        ),
        (("carcinoma", 1, None, False), None),
    ],
)
def test_the_report_says_what_applies(truth, sentence):
    values = dict(zip(("diagnosis", "grade", "quadrant", "necrosis"), truth, strict=True))
    asked = ask("report", values | {"size_mm": None if truth[0] == "normal" else 0.2}, 0.9)
    assert (asked.answer if asked else None) == sentence
    assert asked is None or (asked.task, asked.options) == ("open", None)


def test_questions_per_slide(tmp_path):
    every = build(folder=str(tmp_path), slides=4, **SMALL)
    some = build(folder=str(tmp_path), slides=4, questions_per_slide=2, **SMALL)
    assert set(Counter(case.slides for case in some).values()) == {2}
    assert {case.id for case in some} < {case.id for case in every}


def test_the_registry_knows_it(tmp_path):
    cases = make_env("simulator", {"folder": str(tmp_path), "slides": 1, **SMALL})
    assert all(isinstance(case, Case) for case in cases)
    with pytest.raises(InputError, match="no parameter 'slide'"):
        make_env("simulator", {"folder": str(tmp_path), "slide": 1})


def test_command_line_writes_a_manifest_that_can_be_moved(tmp_path, monkeypatch, capsys):
    words = f"simulator --folder {tmp_path}/a --slides 3 --size_mm 0.5 --mpp 4 --workers 1 --val_fraction 0"
    monkeypatch.setattr("sys.argv", [*words.split(), "--test_fraction", "0"])
    main()
    assert "manifest.jsonl" in capsys.readouterr().out
    direct = build(folder=str(tmp_path / "a"), slides=3, **SMALL)
    shutil.move(tmp_path / "a", tmp_path / "b")
    read = read_manifest(str(tmp_path / "b/manifest.jsonl"))
    assert [(c.id, c.answer, c.options, c.extra["truth"]) for c in read] == [
        (c.id, c.answer, c.options, c.extra["truth"]) for c in direct
    ]
    assert all(case.slides[0].startswith(str(tmp_path / "b")) for case in read)


def test_command_line_names_bad_input(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["simulator", "--folder", str(tmp_path / "a"), "--mpp", "90"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "mpp is 90" in capsys.readouterr().err


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**31),
    size_mm=st.floats(0.4, 1.6),
    kind=st.sampled_from([("normal", None), ("adenoma", None), ("carcinoma", 1), ("carcinoma", 2), ("carcinoma", 3)]),
)
def test_any_seed_and_size(seed, size_mm, kind):
    spec = histology.make_specimen((seed, 0), size_mm=size_mm, diagnosis=kind[0], grade=kind[1])
    truth = spec.truth.as_dict()
    report = synoptic(truth, size_mm)
    assert json.loads(json.dumps(report)) == report
    if kind[0] == "normal":
        assert truth["area_mm2"] == truth["mitoses"] == 0
        assert truth["size_mm"] is truth["margin_mm"] is None
    else:
        assert 0 < truth["size_mm"] < size_mm * 1.42
        assert 0 <= truth["margin_mm"] < size_mm
        assert 0.02 < truth["area_mm2"] / size_mm**2 < 0.2
    assert truth["necrosis_mm2"] < max(truth["area_mm2"], 1e-9)
    for question in QUESTIONS:
        asked = ask(question, truth, size_mm)
        if asked is None:
            continue
        if question == "boxes":
            boxes = parse_boxes(asked.answer)
            assert len(boxes) == truth["foci"] and valid(boxes).all()
        elif question == "synoptic":
            protocol = load_protocol(PROTOCOL)
            read = parse_report(asked.answer, protocol)
            assert not read.problems
            assert not check_record(read.record, protocol, complete=True)
            assert {k: str(report[k]) for k in read.record} == read.record
        elif question == "report":
            for reward in (bleu4, rouge_l, meteor):
                assert reward([gold_completion({"answer": asked.answer})], answer=[asked.answer]) == [1.0]
        else:
            assert asked.answer in asked.options
            assert len(set(asked.options)) == len(asked.options)
    cells = spec.anatomy.cells.get("mitosis")
    assert truth["mitoses"] == (0 if cells is None else len(cells.xy))
    side = round(spec.plan.size_um / 8)
    rgb = histology.draw(spec, 8.0, (0, 0, side, side))
    assert rgb.shape == (side, side, 3)
    assert rgb.std() > 5
