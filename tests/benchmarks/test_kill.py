"""Runs that are killed at random moments; the whole set of phases is in the benchmark."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.kill import differing, kept, measure, temporary, unfinished, unreadable
from frugalpath.recipe.checkpoints import DONE, WHOLE
from tests.cli.conftest import RECIPE, write_recipe


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_runs_resume_to_the_same_report(tmp_path):
    recipe = write_recipe(
        tmp_path,
        tmp_path / "slides",
        sft={**RECIPE["sft"], "max_steps": 4, "save_steps": 2},
        max_steps=4,
        evaluation={"bootstrap": 20, "linear_probe": False, "sft_continued": False},
    )
    found = measure(recipe, tmp_path, ["evaluation"], seed=0)
    for row in found["trials"]:
        assert row["killed"] and not row["problems"], row
    last = found["trials"][-1]
    assert last["calls_spared"]["sft"] == 4 and last["calls_spared"]["update"] == 4, "no stage was run again"


@pytest.mark.parametrize(
    ("name", "content", "broken"),
    [
        ("a.json", b'{"a": 1}', b'{"a": '),
        ("a.jsonl", b'{"a": 1}\n', b'{"a": 1}\n{"b"'),
        ("a.html", b"<html></html>\n", b"<html>"),
        ("a.yaml", b"a: 1\n", b""),
        ("a.safetensors", None, b"123"),
        ("a.h5", None, b"123"),
        ("a.npz", None, b"PK"),
    ],
)
def test_half_a_file_is_noticed(tmp_path, name, content, broken):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
        assert unreadable(path) is None
    path.write_bytes(broken)
    assert str(path) in (unreadable(path) or "")


def test_unfinished_work_is_told_from_finished(tmp_path):
    for stage, done in (("sft", True), ("grpo", False)):
        folder = tmp_path / stage / "checkpoint-2"
        folder.mkdir(parents=True)
        for path in (folder / "model.safetensors", tmp_path / stage / "model.safetensors"):
            path.touch()
        if done:
            (folder / WHOLE).touch()
            (tmp_path / stage / DONE).touch()
    np.savez(tmp_path / "a.npz", a=1)
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and unfinished(p, tmp_path)}
    assert found == {"grpo/model.safetensors", "grpo/checkpoint-2/model.safetensors"}
    assert set(kept(tmp_path)) == {"sft/model.safetensors", f"sft/{DONE}"}
    assert temporary(tmp_path / "a.json.12.34.part") and not temporary(tmp_path / "a.npz")


def test_differences_are_named():
    assert differing({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
    (told,) = differing({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]})
    assert told.startswith("a[1].b: 2")
