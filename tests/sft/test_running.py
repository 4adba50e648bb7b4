from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig
from frugalpath.recipe.sft import Stage
from frugalpath.sft.running import Prepared, Supervision, shown
from tests.conftest import LADDER
from tests.models.test_slide_paths import PATHS

OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def run(cases, tmp_path):
    """Runs a stage of a performer and gives its trainer, its record and which weights moved."""

    def call(performer, kind: str, train=None, **options):
        shared = Supervision(train or cases, cases, None, LADDER, PerformerConfig(), 0)
        before = {name: value.clone() for name, value in performer.model.state_dict().items()}
        stage = Stage(kind, "sft", {**OPTIONS, **options})
        trainer, record = shared.run(stage, performer, tmp_path / "sft", [], None)
        after = performer.model.state_dict()
        return trainer, record, {name for name in before if not torch.equal(after[name], before[name])}

    return call


@pytest.mark.slow
def test_masked_reconstruction_trains_the_resampler_alone(run, make_performer):
    performer = make_performer(**PATHS["locpath"])
    _, record, moved = run(performer, "mae", share=0.5)
    assert moved and all(name.startswith("model.compressor.learned.0.") for name in moved)
    assert set(record["validation"]) >= {"loss", "baseline", "explained"}


def test_slide_text_training_gives_the_compressor_its_weights(run, make_performer, cases, tmp_path):
    performer = make_performer(**PATHS["pathalign"])
    two = [dataclasses.replace(c, images=(*c.images, "field0")) for c in cases]
    _, _, moved = run(performer, "contrastive", [*cases, *two], model={"shared_width": 8, "text_length": 16})
    assert moved and all(name.startswith("model.compressor.learned.0.") for name in moved)
    saved = json.loads((tmp_path / "sft" / "slide_text" / "config.json").read_text())
    assert (saved["queries"], saved["width"], saved["shared_width"]) == (8, 16, 8)


@pytest.mark.slow
def test_frozen_language_needs_an_image(run, make_performer):
    trainer, _, moved = run(make_performer(), "align", max_steps=30)
    assert moved and all(".aligner." in name for name in moved)
    assert trainer.data_collator.text_only == 0
    with pytest.raises(InputError, match=r"sft\.align: text_only 0\.2, but the language model is frozen; set it to 0"):
        run(make_performer(), "align", text_only=0.2)


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("mae", "pathalign", "the mae stage pre-trains a resampler"),
        ("contrastive", "resampler", "the contrastive stage trains a Q-Former"),
        ("contrastive", "pathosynvlm", "trains on uncompressed patches"),
    ],
)
def test_a_stage_that_has_nothing_to_train_is_refused(run, make_performer, kind, path, message):
    with pytest.raises(InputError, match=message):
        run(make_performer(**PATHS[path]), kind)


def test_parts_that_a_performer_has_not_are_not_trained(run, qwen, make_performer):
    with pytest.raises(InputError, match="names seeing, none of which the performer has, so nothing is trained"):
        run(qwen, "align")
    with pytest.raises(InputError, match=r"sft\.case: learning_rate has no effect here; .* in learning_rates"):
        run(make_performer(), "case", learning_rate=1e-3)


@pytest.mark.parametrize(("kind", "path"), [("mae", "locpath"), ("contrastive", "pathalign"), ("case", "locpath")])
def test_a_key_that_no_stage_has_is_named(run, make_performer, kind, path):
    with pytest.raises(InputError, match=r"sft: .*'max_stepz'"):
        run(make_performer(**PATHS[path]), kind, max_stepz=3)


def test_compressors_of_slides_are_not_those_of_images(run, qwen):
    with pytest.raises(InputError, match=r"trains compressors of slides; use performer\.family slide_vlm"):
        run(qwen, "mae")


def test_stages_train_on_the_questions_they_name(run, make_performer, cases):
    mixed = [dataclasses.replace(c, question=("caption", "vqa")[i % 2]) for i, c in enumerate(cases)]
    trainer, _, _ = run(make_performer(), "warm_start", mixed, questions=["caption"])
    assert len(trainer.train_dataset) == 4
    with pytest.raises(InputError, match=r"sft\.align: no case asks report; there are caption, vqa"):
        run(make_performer(), "align", mixed, questions=["report"])


def test_slides_are_read_as_they_are_asked_for(make_performer, cases):
    performer = make_performer(**PATHS["locpath"])
    twice = [cases[0], dataclasses.replace(cases[1], images=("field0", "field1"))]
    rows = Prepared(performer, shown(performer, twice))
    assert rows.sources == ["field0", "field1"] and len(rows) == 2
    assert len(rows[1]) == 30, "what the merger leaves of 36 patches"
