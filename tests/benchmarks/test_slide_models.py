"""The benchmark at a size where it says nothing about speed: its line, its formula, and what it sends through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.slide_models import compare, draw, parse, work
from benchmarks.slide_paths import BUDGETS, PATHS, build, coarse, cut, made_up, write_slide
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.slides.store import write_features

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--dtype", "float32", "--cores", "1", "--hidden", "64", "--layers", "1", "--repeats", "1",
        "--text-tokens", "8", "--answer-tokens", "4"]  # fmt: skip
TIMES = ("prepare_seconds", "prefill_seconds", "train_seconds")
MEMORY = ("prefill_peak_mb", "train_peak_mb", "prefill_above_mb", "train_above_mb")


@pytest.mark.slow
def test_one_line_and_a_picture(tmp_path):
    options = [*TINY, "--paths", "locpath", "--sizes", "32", "--out", str(tmp_path / "made.png")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/slide_models.py", *options],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    (row,) = found["rows"]
    assert (row["n"], row["tokens"], row["in_text"]) == (32, 96, 0)
    assert all(row[key] > 0 for key in (*TIMES, *MEMORY, "fixed_mb")) and row["repeats"] == [1, 1]
    assert found["at"] == 32 and found["repeats"] == 1 and 0 <= found["others_busy"] <= 1
    assert found["machine"]["cores"] and found["versions"]["torch"] and "--sizes 32" in found["command"]
    assert (tmp_path / "made.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_path_of_latents_gives_as_many_tokens_of_any_slide(tmp_path):
    asked = [("plain", 64), ("resampler", 32), ("resampler", 64), ("locpath", 64)]
    rows = [work(parse([*TINY, "--worker", path, str(n)])) for path, n in asked]
    assert [row["tokens"] for row in rows] == [64, 128, 128, 96]
    assert [row["prepared"] for row in rows[:3]] == [64, 32, 64]
    plain, ours = rows[0], rows[3]
    assert plain["fixed_mb"] is None and rows[1]["flops"] < rows[2]["flops"]
    found = compare(rows, [32, 64])
    assert found["at"] == 64 and found["fixed_growth"].keys() == {"resampler", "locpath"}
    assert found["flops_saved"] == pytest.approx(1 - ours["flops"] / plain["flops"], abs=1e-4)
    assert found["memory_saved"] == pytest.approx(1 - ours["train_peak_mb"] / plain["train_peak_mb"], abs=1e-4)
    assert found["memory_saved_less_libraries"] < 1 and found["prefill_ratio"] > 0 and found["train_step_ratio"] > 0
    assert "flops_saved" not in compare(rows[1:], [32, 64])
    draw(rows, tmp_path / "made.png")


@pytest.mark.slow
@pytest.mark.parametrize("path", list(PATHS))
def test_the_formula_counts_what_torch_counts(path, tmp_path):
    """Within 0.2 %, once the masked half of attention among the text, which torch counts as well, is taken off."""
    performer = build(parse(TINY), path, {"slide": write_slide(tmp_path, path, 64, None)})
    case = Case("a", "a", "open", " a" * 8, " a", slides=("slide",))
    prompt = performer.prompt(case, BUDGETS.get(path, 64))
    seen = performer.processor.sight.inputs(performer.model, [prompt.views])
    performer.model.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of others it counts no attention
        performer.model(input_ids=prompt.ids[None], **seen, logits_to_keep=1)
    masked = 2 * performer.shape.layers * len(prompt) ** 2 * performer.shape.hidden
    assert performer.flops(prompt, 1) == pytest.approx(counter.get_total_flops() - masked, rel=0.002)


def test_a_coarse_slide_has_a_64th_of_the_patches():
    fine = made_up(512)
    made = coarse(fine)
    assert len(made) == 8 and made.attrs["patch_size"] == 8 * fine.attrs["patch_size"]
    assert np.allclose(made.features.mean(0), fine.features.mean(0), atol=1e-6)
    assert made.features.shape[1] == fine.features.shape[1]


@pytest.mark.slow
def test_the_middle_of_a_given_slide_is_taken(tmp_path):
    fine = made_up(100)
    part = cut(fine, 9)
    assert np.ptp(part.coords, axis=0).tolist() == [512, 512]
    with pytest.raises(InputError, match="has 100 patches, 101 are asked for; give smaller --sizes"):
        cut(fine, 101)
    write_features(tmp_path / "given.h5", fine)
    row = work(
        parse([*TINY, "--lora", "0", "--features", str(tmp_path / "given.h5"), "--worker", "pathosynvlm", "64"])
    )
    assert 1 <= row["prepared"] <= 4 and row["tokens"] == row["prepared"] + 1, "a marker, and patches of 8 x 8"


def test_every_path_has_a_budget():
    assert BUDGETS.keys() == PATHS.keys() - {"plain"}
