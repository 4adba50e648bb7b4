"""A finished run in a program: the README's lines as they stand there, and images that the run has not seen."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import frugalpath.deploy.answer
import frugalpath.deploy.publish
from frugalpath import Allocator, Case, InputError, Performer
from frugalpath.slides.store import Features, write_features
from tests.cli.conftest import ROOT

QUESTION = {"patient": "new", "task": "choice", "prompt": "What is the diagnosis?", "answer": ""}


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory) -> Path:
    """What answering needs of a finished run; its features are not among it."""
    kept = tmp_path_factory.mktemp("kept")
    for part in ("grpo", "allocator", "report"):
        shutil.copytree(finished[0].parent / "run" / part, kept / part, ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copy(finished[0].parent / "run" / "recipe.yaml", kept)
    return kept


@pytest.fixture(scope="module")
def allocator(folder) -> Allocator:
    return Allocator.from_pretrained(folder)


@pytest.fixture
def field(tmp_path) -> Case:
    """A question about an image that no run has seen."""
    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "field.png")
    return Case(id="field", images=(str(tmp_path / "field.png"),), **QUESTION)


def test_the_lines_of_the_readme_run(finished, slides, tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- example: library.py -->\n```python\n(.*?)```", text, re.S)
    assert len(code.splitlines()) <= 12
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished[0].parent / "run")
    shutil.copy(min((slides / "slides").glob("*.tif")), tmp_path / "slide.tif")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "library.py", "exec"), {})
    rows = re.findall(r"^([\d.]+): (.*) for (\d+) visual tokens, [\d.e+]+ FLOPs$", capsys.readouterr().out, re.M)
    assert [float(price) for price, *_ in rows] == [0.01, 0.1, 1.0]
    tokens = [int(tokens) for *_, tokens in rows]
    assert tokens == sorted(tokens, reverse=True) and set(tokens) <= {1, 4, 16}


def test_a_case_is_answered_as_on_the_command_line(finished, folder, allocator, field, called):
    asked = ["--config", finished[0], "--output_dir", folder, "--image", *field.images, "--json", "--question"]
    for chosen, by in ((allocator.answer(field), []), (allocator.answer_at(field, 4), ["--budget", 4])):
        status, out, err = called(frugalpath.deploy.answer.main, *asked, field.prompt, *by)
        assert status == 0, err
        row = json.loads(out)
        assert (chosen.text, chosen.budget, chosen.visual) == (row["completion"], row["budget"], row["tokens"])
        assert (chosen.flops, chosen.look_flops) == (row["flops_stage2"], row["flops_stage1"])
    assert allocator.choose([field]) == [allocator.answer(field).budget]
    assert not (folder / "features").exists(), "features went to a temporary folder"


def test_a_published_run_answers_alike(folder, allocator, field, called, tmp_path):
    kept = ["--config", folder / "recipe.yaml", "--output_dir", folder]
    status, _, err = called(frugalpath.deploy.publish.main, *kept, "--to", tmp_path / "model")
    assert status == 0, err
    published = Allocator.from_pretrained(tmp_path / "model")
    assert published.price == allocator.price
    assert published.answer(field, 0.03).text == allocator.answer(field, 0.03).text


def test_the_performer_alone_answers_several_cases_at_their_budgets(folder, allocator, field, sources_of):
    alone = folder.parent / f"{folder.name}-performer"
    shutil.copytree(folder / "grpo", alone / "grpo")
    shutil.copy(folder / "recipe.yaml", alone)
    performer = Performer.from_pretrained(alone)
    slide = Case(id="slide", slides=sources_of, **QUESTION)
    found = performer.answer([field, slide, field], [16, 4, 1])
    assert [a.visual for a in found] == [16, 4, 1]
    assert [a.text for a in found] == [
        allocator.answer_at(case, b).text for case, b in ((field, 16), (slide, 4), (field, 1))
    ]
    assert performer.ladder == [1, 4, 16] and performer.processor.tokenizer and performer.model.num_parameters() > 0
    with pytest.raises(InputError, match="frugalpath pareto"):
        Allocator.from_pretrained(alone)


@pytest.fixture
def sources_of(slides) -> tuple[str, ...]:
    """A slide of the run."""
    return (str(min((slides / "slides").glob("*.tif"))),)


def test_what_cannot_be_answered_is_named(folder, allocator, field, tmp_path):
    with pytest.raises(InputError, match=r"has no recipe\.yaml"):
        Allocator.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"other settings \(encoder\.cells\)"):
        Allocator.from_pretrained(folder, "--set", "encoder.cells=1")
    with pytest.raises(InputError, match=r"price -1 must be 0 or more"):
        allocator.answer(field, -1)
    for answer in (
        lambda: allocator.answer_at(field, 99),
        lambda: Performer.from_pretrained(folder).answer([field], [99]),
    ):
        with pytest.raises(InputError, match=r"budget 99 must be in 0\.\.16"):
            answer()
    narrow = tmp_path / "narrow.h5"
    write_features(narrow, Features(np.zeros((4, 8)), np.zeros((4, 2)), {"patch_size": 32, "width": 64, "height": 64}))
    with pytest.raises(InputError, match="8 wide"):
        Performer.from_pretrained(folder).answer([Case(id="narrow", slides=(str(narrow),), **QUESTION)], [4])
