"""What a stage, a table or a fit is known by: contents, wherever they lie."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image

from frugalpath.envs.case import Case
from frugalpath.recipe.cache_key import CONTENTS, reward_digest, sft_key
from frugalpath.recipe.data import RunData, cases_digest
from frugalpath.recipe.run import parse_recipe


@pytest.fixture
def case(tmp_path) -> Case:
    (tmp_path / "here").mkdir()
    Image.new("RGB", (8, 8), "purple").save(tmp_path / "here" / "a.png")
    return Case(
        "a", "p", "choice", "Which?", "normal", images=(str(tmp_path / "here" / "a.png"),), options=("normal", "x")
    )


def test_a_digest_is_that_of_rows_and_pixels_not_of_paths(case, tmp_path):
    before = cases_digest([case])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert cases_digest([dataclasses.replace(case, images=(str(tmp_path / "there" / "a.png"),))]) == before
    Image.new("RGB", (8, 8), "pink").save(tmp_path / "there" / "a.png")
    assert cases_digest([dataclasses.replace(case, images=(str(tmp_path / "there" / "a.png"),))]) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": "x"},
        {"prompt": "What?"},
        {"options": ("normal", "y")},
        {"patient": "q"},
        {"split": "val"},
        {"extra": {"grade": 2}},
        {"id": "b"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_row_is_another_digest(case, changes):
    assert cases_digest([dataclasses.replace(case, **changes)]) != cases_digest([case])
    assert cases_digest([case, case]) != cases_digest([case])


def test_a_reward_file_is_the_one_that_is_read_also_where_two_have_its_name(tmp_path, monkeypatch):
    """The digest was of the file in the working folder, the reward that of the recipe's folder."""
    (tmp_path / "recipe").mkdir()
    for folder in (tmp_path, tmp_path / "recipe"):
        (folder / "mine.py").write_text("def mine(completions, **columns):\n    return [1.0]\n")
    (tmp_path / "terms.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    params = {"params": {"lists": [{"terms": "terms.txt"}], "text": "x" * 5000}}
    run = SimpleNamespace(rewards=[{"name": "mine.py:mine", **params}], base=tmp_path / "recipe")
    before = reward_digest(run)
    (tmp_path / "recipe" / "mine.py").write_text("def mine(completions, **columns):\n    return [0.0]\n")
    changed = reward_digest(run)
    assert changed != before
    (tmp_path / "terms.txt").write_text("b")
    assert reward_digest(run) != changed, "a file that a parameter names, at any depth"


def test_a_mended_training_label_is_another_key_and_a_test_label_is_not(case, tmp_path):
    """Labels that were mended in place, or rows that were added, left stages as they were."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("cases: {name: manifest, path: m.csv}\nladder: [1, 4]\nper_device_train_batch_size: 32\n")
    run = parse_recipe(["--config", str(recipe), "--output_dir", str(tmp_path / "run")])

    def key(train: Case, test: Case) -> dict:
        data = RunData(run, {"train": [train], "val": [], "test": [test]})
        vars(data)["bank"] = SimpleNamespace(missing=())
        return sft_key(data)

    mended = dataclasses.replace(case, answer="x")
    before = key(case, case)
    assert key(case, mended) == before
    changed = key(mended, case)
    assert changed != before and {k: v for k, v in changed.items() if k != CONTENTS} == {
        k: v for k, v in before.items() if k != CONTENTS
    }
