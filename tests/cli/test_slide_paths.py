"""The published slide models from slides to the report: simulated ones, and real ones where they are at hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import frugalpath.rl.grpo
from tests.cli.conftest import RECIPE, ROOT, write_recipe
from tests.models.test_slide_paths import PATHS

pytestmark = pytest.mark.slow
REAL = ROOT.parent / "shared" / "data" / "slides"
STAGE = {"per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 2}
SHORT = {
    "max_steps": 2,
    "save_steps": 2,
    "evaluation": {"bootstrap": 20, "linear_probe": False, "sft_continued": False},
}
RATES = {"seeing": 1e-3, "lora": 0, "language": 1e-3}


def stages(name: str, captions: str, steps: int = 4) -> list[dict]:
    """Stages of a path: those of its compressors, then captions of single slides, then cases."""
    first = {"locpath": "mae", "pathalign": "contrastive"}.get(name)
    before = [] if first is None else [{"stage": first, "questions": [captions], "max_steps": steps, **STAGE}]
    return [
        *before,
        {"stage": "align", "questions": [captions], "max_steps": steps, **STAGE},
        {"stage": "case", "learning_rates": RATES, "max_steps": steps, **STAGE},
    ]


def recipe(folder: Path, name: str, cases: dict, questions: list[str], captions: str, **changes) -> Path:
    return write_recipe(
        folder,
        folder,
        cases=cases,
        questions=questions,
        performer={**RECIPE["performer"], **PATHS[name]},
        sft=stages(name, captions),
        ladder=[2, 8],
        allocator={"look": [2], "fit_epochs": 1},
        **{**SHORT, **changes},
    )


def answers(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "report" / "cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["locpath", "pathalign"])
def test_cases_of_simulated_slides(name, slides, tmp_path, called):
    cases = {
        **RECIPE["cases"],
        "folder": str(slides),
        "slides_per_case": 2,
        "questions": ["report", "case_diagnosis", "which_slide"],
        "test_fraction": 0.4,
    }
    path = recipe(tmp_path, name, cases, ["case_diagnosis", "which_slide"], "report")
    status, _, err = called(frugalpath.rl.grpo.main, "--config", path)
    assert status == 0, err[-3000:]
    run = tmp_path / "run"
    first = {"locpath": "sft_mae", "pathalign": "sft_contrastive"}[name]
    assert all((run / stage / "done.json").is_file() for stage in (first, "sft_align", "sft", "grpo"))
    if name == "locpath":
        told = json.loads((run / first / "done.json").read_text())["validation"]
        assert set(told) >= {"loss", "baseline", "explained"}
    else:
        assert (run / first / "slide_text" / "model.safetensors").is_file()
    rows = answers(tmp_path)
    assert {row["question"] for row in rows} == {"case_diagnosis", "which_slide"}
    assert all(row["tokens"] <= row["budget"] + 2 for row in rows), "a marker for each slide is counted beside"
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert {"gain_over_text_only", "gain_over_majority"} <= set(summary["headline"])


@pytest.fixture(scope="module")
def real_cases(tmp_path_factory) -> dict:
    """A manifest of real slides: captions of single ones, cases of two."""
    if not REAL.is_dir():
        pytest.skip("no real slides here")
    rows = [row for row in csv.DictReader((REAL / "slides.csv").open()) if row["stain"] == "H&E" and row["mpp"]]
    rows = [row for row in rows if (REAL / row["file"]).is_file()][:14]
    folder = tmp_path_factory.mktemp("real")
    lines = []
    for at in range(0, 14, 2):
        pair = rows[at : at + 2]
        split = ("train", "train", "val", "val", "test", "train", "test")[at // 2]
        shared = {"patient": f"p{at}", "split": split}
        lung = "yes" if any(row["organ"] == "lung" for row in pair) else "no"
        lines.append(
            {
                "id": f"case{at}",
                "task": "choice",
                "prompt": "Is there lung tissue?",
                "answer": lung,
                "options": ["yes", "no"],
                "slides": [str(REAL / row["file"]) for row in pair],
                "question": "lung",
                **shared,
            }
        )
        lines += [
            {
                "id": f"caption{at}{k}",
                "task": "open",
                "prompt": "Describe.",
                "answer": f"{row['title']} {at}{k}",
                "slides": [str(REAL / row["file"])],
                "question": "caption",
                **shared,
            }
            for k, row in enumerate(pair)
        ]
    (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"name": "manifest", "path": str(folder / "cases.jsonl"), "allow_outside": True, "allow_shared_text": True}


@pytest.mark.parametrize("name", ["locpath", "pathosynvlm", "pathalign"])
def test_real_slides_from_file_to_answer(name, real_cases, tmp_path, tmp_path_factory, called):
    features = tmp_path_factory.getbasetemp() / "real_features"
    encoder = {"mpp": 8.0, "cells": 7, "folder": str(features), "slide": {"qc": False, "max_tiles": 4}}
    path = recipe(tmp_path, name, real_cases, ["lung"], "caption", encoder=encoder)
    status, _, err = called(frugalpath.rl.grpo.main, "--config", path)
    assert status == 0, err[-3000:]
    rows = answers(tmp_path)
    assert len(rows) == 2 and all(row["tokens"] >= 2 and row["completion"] for row in rows)
