"""The benchmark in a few seconds, and its figures by hand."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bf16 import MEASURES, over_ways, pool
from benchmarks.rounding import SETTINGS, Outcome, Setting, errors, outcomes

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/bf16.py", "--cores", "1", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_ours_in_bfloat16_is_no_further_from_float32_than_trl():
    done = run("--only", "llama 64x2", "--seeds", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["float32_grad_difference"] < 5e-6 and found["float32_logp_difference"] < 5e-6
    assert 1e-3 < found["stock_error"] < 0.05, "bfloat16 has 8 bits"
    low, high = found["ratio_interval"]
    assert low < found["ratio"] < high < 1.1
    assert found["logp_ratio"] < 1.2
    assert [row["way"] for row in found["table"]] == ["autocast", "weights"] == list(found["by_way"])
    assert found["n"] == 3 and "--only 'llama 64x2'" in found["command"]


@pytest.mark.slow
def test_a_setting_that_is_not_there_and_flex_without_a_gpu_are_refused():
    done = run("--only", "mamba")
    assert done.returncode and "no such setting; there are: llama 64x2" in done.stderr and not done.stdout
    done = run("--attention", "flex")
    assert done.returncode == 2 and "add --device cuda" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "sharp"), [(False, 1.0), (True, 4.0)])
def test_both_trainers_get_the_same_weights_prompts_images_and_completions(lora, sharp):
    """In float32 they agree, in bfloat16 they do not; two seeds have nothing in common."""
    setting = Setting("qwen2_5_vl", 64, 1, image=4, text=12, group=2, written=4, prompts=2, lora=lora, sharp=sharp)
    truth: dict[int, Outcome] = {}
    outcomes(setting, "stock", "float32", 5, 2, "cpu", False, truth.__setitem__)
    assert list(truth) == [0, 1]
    assert all(("lora" in name) == lora and "visual" not in name for name in truth[0].gradients)
    for name, gradient in truth[0].gradients.items():
        assert (truth[1].gradients[name] - gradient).norm() > 0.5 * gradient.norm()
    own: dict[int, Outcome] = {}
    outcomes(setting, "ours", "float32", 5, 2, "cpu", False, own.__setitem__)
    for step, outcome in own.items():
        assert max(errors(outcome, truth[step]).values()) < 1e-4
    rounded: dict[int, Outcome] = {}
    outcomes(setting, "ours", "weights", 6, 1, "cpu", False, rounded.__setitem__)
    off = errors(rounded[0], truth[1])
    assert 1e-3 < off["grad"] < 0.1 and 1e-4 < off["logp"] < 0.1, "seed 6 is the second from 5"


def test_errors_are_those_of_all_tensors_as_one_vector_and_of_each():
    truth = Outcome(torch.tensor([-1.0, -2.0]), {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])})
    found = Outcome(torch.tensor([-1.0, -2.2]), {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.4]])})
    assert errors(found, truth) == pytest.approx(
        {"logp": 0.2 / math.sqrt(2), "grad": 0.1, "median": 0.1, "max": 0.1}, rel=1e-5
    )
    with pytest.raises(RuntimeError, match=r"different tensors: \['b'\]"):
        errors(Outcome(found.logps, {"a": found.gradients["a"]}), truth)


def test_log_probabilities_of_other_completions_are_no_error_but_refused():
    with pytest.raises(RuntimeError, match="3 tokens and 2"):
        errors(Outcome(torch.zeros(3), {}), Outcome(torch.zeros(2), {}))


def cell(stock: list[float], ours: list[float]) -> dict[str, dict[str, list[float]]]:
    return {"stock": dict.fromkeys(MEASURES, stock), "ours": dict.fromkeys(MEASURES, ours)}


def test_a_ratio_is_of_geometric_means_with_the_interval_of_paired_seeds():
    """One cell of two seeds: t of 1 degree of freedom is 12.706."""
    found = pool([cell([0.01, 0.04], [0.02, 0.04])], "grad")
    middle, error = math.log(2) / 2, math.log(2) / 2
    assert found["stock"] == 0.02 and found["ours"] == float(f"{math.sqrt(0.02 * 0.04):.3g}")
    assert found["ratio"] == pytest.approx(math.exp(middle), abs=1e-4)
    bounds = [math.exp(middle - 12.7062 * error), math.exp(middle + 12.7062 * error)]
    assert found["interval"] == pytest.approx(bounds, rel=1e-3, abs=1e-4)


def test_cells_weigh_alike_and_a_single_seed_has_no_interval():
    found = pool([cell([0.01], [0.02]), cell([0.01], [0.01])], "logp")
    assert found["ratio"] == pytest.approx(math.sqrt(2), abs=1e-4) and found["interval"] is None


def test_ways_that_share_their_seeds_count_once():
    one, two = cell([0.01, 0.02], [0.02, 0.02]), cell([0.04, 0.02], [0.02, 0.08])
    joined = over_ways({"autocast": one, "weights": two})
    assert joined["stock"]["max"] == pytest.approx([0.02, 0.02])
    assert joined["ours"]["max"] == pytest.approx([0.02, statistics.geometric_mean([0.02, 0.08])])


def test_settings_have_names_of_their_own_and_square_images():
    for kind in SETTINGS.values():
        assert len({s.name for s in kind}) == len(kind)
    with pytest.raises(ValueError, match="image of 5 tokens"):
        Setting("qwen2_5_vl", 64, 1, image=5, text=8, group=2, written=4)
