"""The benchmark of the rewards at a size where it says nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_scores_varied_completions():
    done = subprocess.run(
        [sys.executable, "benchmarks/rewards.py", "--completions", "40", "--repeats", "2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["completions_per_s"] > 0 and found["fields"] == 20 and found["n"] == 40
    assert 0.1 < found["mean_score"] < 1
