"""deploy/publish.py as a user calls it: the folder answers like the run, alone, and holds nothing of the cases."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import frugalpath.deploy.answer
import frugalpath.deploy.publish
import frugalpath.rl.allocate
import frugalpath.rl.grpo
import frugalpath.rl.pareto
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.deploy.publishing import uploads
from frugalpath.deploy.run import MARK
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.tokenizer import train_tokenizer
from tests.cli.conftest import RECIPE, command, write_recipe

pytestmark = pytest.mark.slow
TIMES = ("latency_ms_stage1", "latency_ms_stage2")


@pytest.fixture(scope="module")
def question(slides, finished) -> tuple:
    slide = min((slides / "slides").glob("*.tif"))
    return "--slide", slide, "--question", "What is the diagnosis?", "--json"


@pytest.mark.parametrize("form", ["value", "policy", "cascade"])
def test_a_published_run_answers_like_the_run(finished, slides, question, called, tmp_path, form):
    recipe = Path(shutil.copy(finished[0], tmp_path))
    source = ["--config", recipe, "--output_dir", tmp_path / "run"]
    if form == "policy":
        source += ["--set", "allocator.form=policy", "allocator.fit_epochs=1", "evaluation.sft_continued=false"]
        shutil.copytree(finished[0].parent / "run" / "sft", tmp_path / "run" / "sft")
        shutil.copytree(finished[0].parent / "run" / "features", tmp_path / "run" / "features")
        assert called(frugalpath.rl.grpo.main, *source)[0] == 0
    else:
        shutil.copytree(finished[0].parent / "run", tmp_path / "run")
    if form == "cascade":
        source += ["--set", "allocator.form=cascade"]
        assert called(frugalpath.rl.pareto.main, *source)[0] == 0
    status, out, err = called(frugalpath.deploy.publish.main, *source, "--to", tmp_path / "published")
    assert status == 0 and "MB" in out, err
    kept = json.loads((tmp_path / "published" / "allocator" / "decider.json").read_text())
    assert kept["form"] == form
    asked = {}
    for budget in ([], ["--price", 0.03], ["--budget", 4]):
        status, out, err = called(frugalpath.deploy.answer.main, *source, *question, *budget)
        assert status == 0, err
        asked[tuple(budget)] = json.loads(out)
    moved = (tmp_path / "run").rename(tmp_path / "away")
    shutil.rmtree(moved)
    recipe.unlink()
    for budget, row in asked.items():
        status, out, err = called(frugalpath.deploy.answer.main, "--model", tmp_path / "published", *question, *budget)
        assert status == 0, err
        found = json.loads(out)
        # Features are encoded anew, in float16.
        assert found.pop("confidence") == pytest.approx(row.pop("confidence"), rel=1e-3)
        assert {k: v for k, v in found.items() if k not in TIMES} == {k: v for k, v in row.items() if k not in TIMES}
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "published"), SlideVLM)


@pytest.fixture(scope="module")
def published(finished, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["--to", str(folder), "--data", "Made-up slides", "--license", "apache-2.0"]
        patch.setattr(sys, "argv", [*command("deploy/publish.py", finished[0])[3:], *arguments])
        frugalpath.deploy.publish.main()
    return folder


def test_nothing_of_the_cases_and_of_this_machine_is_in_it(finished, published, slides):
    run = finished[0].parent / "run"
    tables = [ScoreTable.load(path) for path in (run / "tables").glob("grpo.*.jsonl")]
    names = {name for table in tables for name in (*table.ids, *table.patients)}
    assert len(names) > 10
    places = {str(run), str(slides), str(finished[0].parent), os.path.expanduser("~") + "/"}
    for path in published.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md", ".jinja"):
            text = path.read_text()
            assert not [name for name in (*names, *places) if name in text], path
        if path.suffix == ".npz":
            with np.load(path) as kept:
                words = {str(w) for key in kept if kept[key].dtype.kind == "U" for w in kept[key].ravel()}
            assert not words & names
    assert not list(published.rglob("*.jsonl")) + list(published.rglob("*.npy")) + list(published.rglob("*.h5"))


def test_the_card_tells_data_results_and_limits(finished, published):
    summary = json.loads((finished[0].parent / "run" / "report" / "summary.json").read_text())
    card = ModelCard.load(published / "README.md")
    (result,) = card.data.eval_results
    assert result.dataset_name == "Made-up slides" and card.data.license == "apache-2.0"
    assert result.metric_value == pytest.approx(summary["operating_point"]["accuracy"], abs=1e-4)
    text = card.text
    assert "not a medical device" in text and "For research only" in text
    low, high = summary["operating_point"]["ci95"]
    row = f"| {summary['operating_point']['accuracy']:.3f} | [{low:.3f}, {high:.3f}] | {summary['n']} |"
    assert row in text, "results stand with n and interval"
    for split in ("train", "val", "test"):
        assert f"| {split} | {summary['splits'][split]} | {summary['patients'][split]} |" in text
    for control in ("random, same mean budget", "no image", "commonest answer"):
        assert f"| {control} | " in text
    assert summary["versions"]["torch"] in text and "Seed " in text
    own = (finished[0].parent / "run" / "grpo" / "README.md").read_text()
    for card_text in (text, own):
        assert "--question 'What is the diagnosis?' --options " in card_text or "quadrant" in card_text
        assert "- What is the diagnosis? (" in card_text
    assert "not a medical device" in own and "time machine" not in own, "it takes the place of the trainer's"


def test_only_what_was_written_is_uploaded(published, called, monkeypatch):
    (published / "answers.jsonl").write_text("{}\n")
    files = uploads(published)
    assert "answers.jsonl" not in files and {"README.md", "model.safetensors", MARK, "recipe.yaml"} <= set(files)
    (published / "answers.jsonl").unlink()
    assert sorted(files) == sorted(str(p.relative_to(published)) for p in published.rglob("*") if p.is_file())
    monkeypatch.setattr(frugalpath.deploy.publish, "get_token", lambda: None)
    status, _, err = called(frugalpath.deploy.publish.main, "--to", published, "--push", "someone/model")
    assert status == 2 and "no Hub token" in err and "HF_TOKEN" in err
    monkeypatch.setattr(frugalpath.deploy.publish, "get_token", lambda: "hf_none")
    status, _, err = called(frugalpath.deploy.publish.main, "--to", published, "--push", "someone/model")
    assert status == 2 and "--push someone/model: " in err and "Traceback" not in err, "the Hub is out of reach"


def test_another_form_than_that_of_the_last_report_is_refused(finished, question, called, tmp_path):
    recipe = Path(shutil.copy(finished[0], tmp_path))
    shutil.copytree(finished[0].parent / "run", tmp_path / "run")
    source = ["--config", recipe, "--output_dir", tmp_path / "run"]
    cascade = [*source, "--set", "allocator.form=cascade"]
    kept = tmp_path / "run" / "allocator" / "decider.json"
    for reported, other, form in ((cascade, source, "cascade"), (source, cascade, "value")):
        if form == "value":
            assert called(frugalpath.rl.allocate.main, *source)[0] == 0
            assert json.loads(kept.read_text())["form"] == "cascade", "the report is still of that"
        assert called(frugalpath.rl.pareto.main, *reported)[0] == 0
        assert json.loads(kept.read_text())["form"] == form
        for main, given in (
            (frugalpath.deploy.answer.main, question),
            (frugalpath.deploy.publish.main, ["--to", tmp_path / "model"]),
        ):
            status, _, err = called(main, *other, *given)
            assert status == 2 and f"--set allocator.form={form}" in err and "frugalpath pareto" in err, err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "PUBLISHED"], "--config"),
        (["--to", "PUBLISHED", "--config", "RECIPE"], "exists"),
        (["--to", "NEW", "--config", "RECIPE", "--output_dir", "NEW"], "not finished"),
    ],
)
def test_refusals_say_what_to_do(finished, published, called, tmp_path, arguments, message):
    places = {"PUBLISHED": published, "RECIPE": finished[0], "NEW": tmp_path / "new"}
    status, _, err = called(frugalpath.deploy.publish.main, *[places.get(a, a) for a in arguments])
    assert status == 2 and message in err
    assert not (tmp_path / "new").exists()


def test_a_published_folder_is_asked_for_what_it_can_answer(published, called, question):
    for arguments, message in (
        (["--model", published, "--split", "test"], "includes no cases"),
        (["--model", published, "--config", "x.yaml", *question], "the folder includes its recipe"),
        (["--model", published.parent, *question], "was not written by `frugalpath publish`"),
        (["--model", published, *question, "--set", "encoder.mpp=1.0"], "encoder.mpp"),
    ):
        status, _, err = called(frugalpath.deploy.answer.main, *arguments)
        assert status == 2 and message in err, err


def test_adapters_are_published_over_their_base(tmp_path, slides, called, question):
    tokenizer = train_tokenizer(["What is the diagnosis? normal adenoma carcinoma"], 300)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    # One token fewer than the tokenizer has, so that the performer adds one.
    config = Qwen2Config(**shape, num_key_value_heads=1, vocab_size=len(tokenizer) - 1, **special)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = write_recipe(
        tmp_path,
        slides,
        performer={"language_model": str(tmp_path / "base"), "lora": {"r": 2}, "show_options": False},
        sft={**RECIPE["sft"], "max_steps": 4},
        max_steps=2,
        evaluation={"bootstrap": 20, "linear_probe": False, "sft_continued": False},
    )
    assert called(frugalpath.rl.grpo.main, "--config", recipe)[0] == 0
    status, _, err = called(frugalpath.deploy.publish.main, "--config", recipe, "--to", tmp_path / "model")
    assert status == 2 and "--base" in err and "--merge" in err
    source = ["--config", recipe, "--to"]
    status, _, err = called(frugalpath.deploy.publish.main, *source, tmp_path / "model", "--base", tmp_path / "base")
    assert status == 0, err
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "model" / "adapter" / "added_tokens.safetensors").is_file()
    assert called(frugalpath.deploy.publish.main, *source, tmp_path / "whole", "--merge")[0] == 0
    rows = []
    for name in ("model", "whole"):
        status, out, err = called(frugalpath.deploy.answer.main, "--model", tmp_path / name, *question, "--budget", 4)
        assert status == 0, err
        rows.append(json.loads(out))
    assert rows[0]["completion"] == rows[1]["completion"]
    assert rows[0]["confidence"] == pytest.approx(rows[1]["confidence"], rel=1e-4)
