"""The benchmark at a size where it says nothing about speed: both trainers run, and agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--hidden 64 --layers 1 --image-tokens 4 --text-tokens 24 --completion-tokens 3 --group 2 --steps 1 --cores 1"


@pytest.mark.slow
def test_both_trainers_are_timed_and_agree():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/shared_prefix.py", *SMALL.split(), "--device", "cpu"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["max_logp_diff"] < 1e-5 and found["max_grad_rel_diff"] < 1e-5
    for part in ("train_step", "generate", "step"):
        assert found[f"{part}_ratio"] > 0 and all(s > 0 for s in found[f"{part}_seconds"]["ours"])
    assert found["memory_ratio"] > 0 and found["first_sight"]["step_ratio"] > 0
    assert found["n"] == 1 and found["options"]["group"] == 2 and "--group 2" in found["command"]
