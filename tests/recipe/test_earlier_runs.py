"""Recipes and run folders of the version before, whose removed features were off: nothing is made anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.value import ValueNetwork
from frugalpath.errors import InputError
from frugalpath.recipe.cache_key import grpo_key, sft_key
from frugalpath.recipe.checkpoints import DONE, fingerprint, is_done
from frugalpath.recipe.finished import kept_form
from frugalpath.recipe.run import Run, parse_recipe

RECIPE: dict[str, Any] = {
    "cases": {"name": "simulator", "folder": "f"},
    "performer": {"hidden": 32},
    "ladder": [1, 4],
    "per_device_train_batch_size": 32,
}

# As `python rl/grpo.py` wrote them at db034de, for this recipe and each form of the allocator.
SFT = json.loads(
    '{"cases": {"name": "simulator", "folder": "f"}, "questions": null, "encoder": {"name": "efficientnet-lite0", '
    '"revision": null, "trust_remote_code": false, "field_side": null, "mpp": 2.0, "tile_px": 224, "cells": 7, '
    '"slide": {}, "folder": null, "strict": false}, "performer": {"family": "slide_vlm", "checkpoint": null, '
    '"language_model": null, "pretrained": null, "freeze_vision": true, "lora": null, "layers": 3, "hidden": 32, '
    '"heads": 4, "kv_heads": 2, "ffn": 256, "vocab_size": 1024, "compressors": ["pool"], "aligner": "place", '
    '"aligner_width": 256, "aligner_dropout": 0.1, "markers": "none", "max_slides": 32, "fusion": "prefix", '
    '"cross_layers": null, "cross_heads": null, "show_options": true, "repeat_prompt": false, "system": null}, '
    '"ladder": [1, 4], "sft": [{"kind": "warm_start", "name": "sft", "options": {}}], "balance": false, "seed": 42}'
)
ONLINE = json.loads(
    '{"look": [1, 4], "share": "equal", "width": 64, "dropout": 0.3, "price": 0.1, "temperature": 0.03, '
    '"explore": 0.3, "learning_rate": 0.002}'
)
POLICY = json.loads('{"price_range": [0.003, 1.0], "entropy": 0.03, "entropy_decay": 1.0, "advantage": "rloo"}')
FIT = json.loads(
    '{"look_state": null, "look_confidence": null, "fit_learning_rate": 0.0003, "fit_epochs": 40, '
    '"weight_decay": 0.01}'
)
CONFIG = (
    '{"buckets": 64, "dropout": 0.3, "feature_dim": 8, "ladder": [1, 4], "look": [1], "look_confidence": null, '
    '"look_dropout": 0.5, "look_state": null, "model_type": "frugalpath_allocator", "share": "equal", "state_dim": 0, '
    '"transformers_version": "5.23.0", "width": 16}'
)


def read(folder: Path, **allocator: Any) -> Run:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "output_dir": str(folder / "run"), "allocator": allocator}))
    return parse_recipe(["--config", str(path)])


@pytest.mark.parametrize("form", ["value", "policy", "escalate", "text"])
def test_finished_stages_stay_finished(tmp_path, form):
    run = read(tmp_path, form=form)
    data = SimpleNamespace(run=run, bank=SimpleNamespace(missing=[]), digest=str)
    now = grpo_key(data)
    text = {"form": "text"} if form == "text" else {}
    own = {**POLICY, "form": "policy"} if form == "policy" else {}
    # What comes of the trainer's arguments depends on the installed packages.
    before = {**SFT, **text, "rewards": now["rewards"], "grpo": now["grpo"], "allocator": {**ONLINE, **own}}
    fit = {**ONLINE, **FIT, **own, **({} if form == "value" else {"form": form})}
    found = [
        ("sft", {**SFT, **text}, sft_key(data, 1)),
        ("grpo", before, now),
        ("allocator", {**before, "fit": fit}, {**now, "fit": run.allocator.settings()}),
    ]
    for name, parts, own_parts in found:
        (tmp_path / name).mkdir()
        record = {"fingerprint": fingerprint(parts), "parts": parts, "steps": 7}
        (tmp_path / name / DONE).write_text(json.dumps(record))
        assert is_done(tmp_path / name, own_parts) == record


def test_a_saved_allocator_is_read(tmp_path):
    (tmp_path / "config.json").write_text(CONFIG)
    torch.manual_seed(0)
    made = ValueNetwork(AllocatorConfig(ladder=(1, 4), look=(1,), feature_dim=8, width=16, buckets=64)).eval()
    save_file(made.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    again = ValueNetwork.from_pretrained(tmp_path)
    look, question = torch.randn(3, 2, 1, 8), torch.ones(3, 4, dtype=torch.long)
    assert torch.equal(again(look, question), made(look, question))
    again.save_pretrained(tmp_path / "again")
    assert not {"share", "look_state", "look_confidence", "state_dim"} & set(
        json.loads((tmp_path / "again" / "config.json").read_text())
    )


@pytest.mark.parametrize("changes", [{"share": "attention"}, {"share": "split"}, {"look_state": 4}, {"state_dim": 2}])
def test_a_saved_allocator_that_needs_what_was_removed_is_refused(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(CONFIG), **changes}))
    (key,) = changes
    with pytest.raises(InputError, match=rf"{key} .* was removed before 0\.1\.0.*train again"):
        ValueNetwork.from_pretrained(tmp_path)


def test_a_run_of_a_removed_form_is_refused(tmp_path):
    (tmp_path / "allocator").mkdir()
    (tmp_path / "allocator" / "decider.json").write_text('{"form": "split"}')
    with pytest.raises(InputError, match=r"decider.json: form 'split' was removed"):
        kept_form(SimpleNamespace(folder=tmp_path))


def test_removed_keys_at_their_defaults_are_passed_over_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = read(tmp_path, share="equal", fit_splits=12, look_state=None, look_confidence=None, width=32)
    assert run.allocator.width == 32
    told = [record.getMessage() for record in caplog.records if "no longer has an effect" in record.getMessage()]
    keys = ("fit_splits", "look_confidence", "look_state", "share")
    assert told == [f"allocator.{key} no longer has an effect; remove it" for key in keys]


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (
            {"share": "attention"},
            r"allocator.share: 'attention' was removed before 0.1.0, .*equal shares at equal cost",
        ),
        ({"share": "split", "fit_splits": 24}, "allocator.share: 'split' was removed .*remove the key"),
        (
            {"look_state": 4, "look_confidence": None},
            "allocator.look_state: 4 was removed .*about as much as it gained",
        ),
        ({"look_confidence": 1}, "allocator.look_confidence: 1 was removed .*set allocator.form to cascade"),
    ],
)
def test_removed_keys_that_ask_for_something_are_refused(tmp_path, allocator, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, **allocator)
    assert len(error.value.problems) == 1 and "6926608" in str(error.value)


def test_the_former_name_of_a_form_works_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = read(tmp_path, form="escalate")
    assert run.allocator.form == "cascade"
    assert "allocator.form: escalate is called cascade now; write that" in caplog.text
    (tmp_path / "run" / "allocator").mkdir(parents=True)
    (tmp_path / "run" / "allocator" / "decider.json").write_text('{"form": "escalate"}')
    assert kept_form(run) == "cascade"
