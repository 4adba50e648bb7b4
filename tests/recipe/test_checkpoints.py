from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from frugalpath.errors import InputError
from frugalpath.recipe.checkpoints import (
    Clock,
    MarkWhole,
    checkpoints,
    fingerprint,
    is_done,
    last_whole,
    mark_done,
    mark_started,
)


def test_only_whole_checkpoints_are_resumed_from(tmp_path):
    assert last_whole(tmp_path / "absent") is None
    for step in (2, 10, 9, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-99.tmp").mkdir()
    assert last_whole(tmp_path) is None
    marker = MarkWhole(Clock())
    for step in (2, 9, 10):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, best_model_checkpoint=None)
        marker.on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-10"), "the newest by number, 30 was cut short"


@pytest.mark.parametrize(
    ("most", "best", "kept"), [(1, None, {6}), (2, None, {4, 6}), (1, 2, {2, 6}), (None, None, {2, 4, 6})]
)
def test_earlier_checkpoints_are_dropped_when_the_new_one_is_whole(tmp_path, most, best, kept):
    args, clock = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=most), Clock()
    marker = MarkWhole(clock)
    marker.on_train_begin(args, SimpleNamespace(global_step=0), None)
    assert args.save_total_limit is None, "the trainer drops none by itself"
    (tmp_path / "checkpoint-1").mkdir()  # a killed run's
    marked = clock.mark
    clock.mark = lambda path: (before.append(last_whole(tmp_path)), marked(path))
    before = []
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        name = None if best is None else str(tmp_path / f"checkpoint-{best}")
        marker.on_save(
            args, SimpleNamespace(is_world_process_zero=True, global_step=step, best_model_checkpoint=name), None
        )
    assert before == [None, *(str(tmp_path / f"checkpoint-{step}") for step in (2, 4))], "there always is a whole one"
    assert set(checkpoints(tmp_path)) == kept and last_whole(tmp_path) == str(tmp_path / "checkpoint-6")


def test_other_processes_do_not_mark(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    state = SimpleNamespace(is_world_process_zero=False, global_step=1)
    MarkWhole(Clock()).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, None)
    assert last_whole(tmp_path) is None


def test_a_finished_stage_is_known_by_its_settings(tmp_path):
    parts = {"ladder": [1, 4], "seed": 0, "sft": {"max_steps": 3}}
    assert is_done(tmp_path / "sft", parts) is None
    mark_done(tmp_path / "sft", parts, steps=3, log=[{"loss": 0.5}])
    record = is_done(tmp_path / "sft", dict(reversed(parts.items())))
    assert (record["steps"], record["log"]) == (3, [{"loss": 0.5}])
    assert [p.name for p in (tmp_path / "sft").iterdir()] == ["done.json"]


def test_other_settings_are_refused_by_name(tmp_path):
    mark_done(tmp_path, {"ladder": [1, 4], "seed": 0, "gone": 1})
    with pytest.raises(InputError, match=r"made with other settings \(gone, new, seed\); choose another output_dir"):
        is_done(tmp_path, {"ladder": [1, 4], "seed": 1, "new": 2})
    assert json.loads((tmp_path / "done.json").read_text())["parts"]["seed"] == 0


def test_settings_that_json_writes_otherwise_are_the_same(tmp_path):
    mark_done(tmp_path, {"ladder": (1, 4), "path": tmp_path})
    assert is_done(tmp_path, {"ladder": [1, 4], "path": str(tmp_path)})


def test_the_fingerprint_depends_on_every_value():
    parts = {"a": 1, "b": {"c": [1, 2]}}
    assert fingerprint(parts) == fingerprint({"b": {"c": [1, 2]}, "a": 1})
    assert fingerprint(parts) != fingerprint({"a": 1, "b": {"c": [2, 1]}})


def test_an_unfinished_stage_goes_on_with_its_own_settings_alone(tmp_path):
    """A stage that was killed and started again with another learning rate went on with the old schedule."""
    key = {"grpo": {"learning_rate": 1e-3}, "contents": {"training cases": "a", "reward files": "b"}}
    mark_started(tmp_path, key)
    mark_started(tmp_path, {**key, "grpo": {"learning_rate": 1e-4}})  # nothing is trained yet
    mark_started(tmp_path, key)
    (tmp_path / "checkpoint-2").mkdir()
    mark_started(tmp_path, key)
    with pytest.raises(InputError, match=r"holds checkpoints of a training with other settings \(grpo\)"):
        mark_started(tmp_path, {**key, "grpo": {"learning_rate": 1e-4}})
    other = {**key, "contents": {"training cases": "a", "reward files": "c"}}
    with pytest.raises(InputError, match="from other reward files"):
        mark_started(tmp_path, other)
    mark_done(tmp_path, key, steps=2)
    assert is_done(tmp_path, key)["steps"] == 2 and not (tmp_path / "started.json").exists()
    with pytest.raises(InputError, match="was made from other training cases"):
        is_done(tmp_path, {**key, "contents": {"training cases": "z"}})


def test_a_stage_of_an_earlier_version_is_known_by_its_settings(tmp_path):
    mark_done(tmp_path, {"seed": 1}, steps=2)
    assert is_done(tmp_path, {"seed": 1, "contents": {"training cases": "a"}})["steps"] == 2
