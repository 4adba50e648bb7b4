"""What reaches the trainers' logs: figures always, completions and pictures only when they are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from frugalpath.models.vision_adapter import Prompt
from frugalpath.recipe.grpo import GroupConfig
from frugalpath.rl.completion_log import pictures
from frugalpath.rl.trainer import GroupTrainer
from tests.conftest import LADDER, SIDE
from tests.rl.qwen import IMAGES, QUESTIONS, SHORT_RUN, even_tokens, make_model, make_processor, make_rows


@pytest.fixture
def events(tmp_path):
    """Reads the events that a run has written for TensorBoard."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: Path):
        (file,) = (f.parent for f in folder.rglob("events.out.tfevents.*"))
        found = accumulator.EventAccumulator(str(file), {"tensors": 0, "images": 0, "scalars": 0})
        return found.Reload()

    return read


def texts(found) -> str:
    """All words of the events."""
    values = [e.tensor_proto.string_val for tag in found.Tags()["tensors"] for e in found.Tensors(tag)]
    return "\n".join(text.decode() for row in values for text in row)


@pytest.mark.slow
def test_figures_are_logged_and_no_words(make_performer, make_trainer, events, cases, tmp_path):
    make_trainer(make_performer(), report_to="tensorboard", logging_steps=1).train()
    found = events(tmp_path)
    assert {"train/rewards/choice/mean", "train/allocator/drawn_tokens", "train/reward"} <= set(
        found.Tags()["scalars"]
    )
    assert len(found.Scalars("train/reward")) == 3
    assert not found.Tags()["images"] and not list(tmp_path.rglob("completions"))
    words = texts(found)
    assert not any(case.prompt in words or case.id in words or case.patient in words for case in cases)


@pytest.mark.slow
def test_completions_and_budgets_are_logged(make_performer, make_trainer, events, cases, tmp_path):
    make_trainer(make_performer(), report_to="tensorboard", log_completions=True).train()
    words = texts(events(tmp_path))
    assert "| prompt | budget | tokens | completion | format | choice |" in words and cases[0].prompt in words
    assert not any(case.id in words or case.patient in words for case in cases)
    table = pyarrow.parquet.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pydict()
    assert set(table["budget"]) <= set(LADDER) and len(table["completion"]) == 8
    assert all(0 < tokens <= budget for tokens, budget in zip(table["tokens"], table["budget"], strict=True))


def test_pictures_are_logged_as_they_were_shown(events, tmp_path):
    processor = make_processor()
    args = {**SHORT_RUN, "output_dir": str(tmp_path), "max_steps": 2, "report_to": "tensorboard"}
    args |= {"num_generations": 2, "per_device_train_batch_size": 4, "log_completions": True}
    GroupTrainer(
        model=make_model(processor),
        reward_funcs=[even_tokens],
        args=GroupConfig(**args),
        train_dataset=make_rows("images"),
        processing_class=processor,
    ).train()
    found = events(tmp_path)
    shown = [e for tag in found.Tags()["images"] for e in found.Images(tag)]
    assert {e.step for e in shown} == {1, 2}
    assert {(e.width, e.height) for e in shown} <= {size for row in IMAGES["images"] for size in row}
    table = pyarrow.parquet.read_table(tmp_path / "completions" / "completions_00001.parquet").to_pydict()
    # The question of each logged row stands beside the pictures of that row.
    questions = [message["content"][-1]["text"] for (message,) in table["prompt"]]
    sizes = dict(zip(QUESTIONS, IMAGES["images"], strict=True))
    for row, question in enumerate(questions):
        of_row = [(e.width, e.height) for e in found.Images(f"shown/{row}") if e.step == 1]
        assert sorted(of_row) == sorted(sizes[question])


def test_a_picture_is_averaged_over_the_cells_of_stored_features(performer, cases, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6 * SIDE, 6 * SIDE, 3), np.uint8)).save(path)
    (view,) = performer.see(cases[0], 4)
    prompt = performer.prompt(cases[0], 4)
    shown = Prompt(prompt.ids, (replace(view, source=str(path)),), prompt.positions)
    (image,) = pictures(shown, ())
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) == 4, "one colour a token"
    assert pictures(prompt, ()) == [], "there are only features of it"
