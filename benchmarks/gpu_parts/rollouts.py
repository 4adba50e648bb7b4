"""vLLM on the GPU: the tests that compare its log-probabilities with those of the policy that is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_parts.task import Task, command


def run(task: Task) -> Iterator[dict[str, Any]]:
    """The line that pytest ends with."""
    test = ["tests/rl/test_vllm.py", "-k", "colocate and mixed", "-q", "-x", "-p", "no:cacheprovider"]
    out = command([sys.executable, "-m", "pytest", *test])
    yield {"case": "colocate", "tests": out.strip().splitlines()[-1]}
