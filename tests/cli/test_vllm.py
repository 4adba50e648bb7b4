"""A whole run of a small Qwen2.5-VL whose rollouts vLLM writes, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.cli.conftest import ENVIRONMENT, RECIPE, ROOT, command, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
START = "from tests.rl.vllm_worker import exact; exact(); import frugalpath.rl.grpo; frugalpath.rl.grpo.main()"


def test_vllm_runs_to_the_report(tmp_path, fields):
    recipe = write_recipe(
        tmp_path,
        tmp_path,
        cases=fields,
        encoder={"field_side": 112},
        performer={**RECIPE["performer"], "family": "qwen_vl", "hidden": 64},  # vLLM takes heads of 32 and more
        ladder=[6, 9, 12],
        allocator={**RECIPE["allocator"], "look": [6]},
        sft={**RECIPE["sft"], "max_steps": 20},
        max_steps=4,
        max_completion_length=16,
        use_vllm=True,
        vllm_max_model_length=256,
    )
    options = command("rl/grpo.py", recipe)[4:]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START, *options],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "report:" in done.stdout
    log = json.loads((tmp_path / "run" / "grpo" / "done.json").read_text())["log"]
    apart = [row["sampling/sampling_logp_difference/mean"] for row in log if "loss" in row]
    assert len(apart) == 4 and max(apart) < 0.01, "it writes by the policy that is trained, at every budget"
