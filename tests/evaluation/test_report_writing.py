"""What a report says of its own making is what was done."""

from __future__ import annotations

import subprocess
import sys

import pytest

from frugalpath.evaluation.report.writing import command, revision

LAUNCHERS = ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_CONFIG_DS_FIELDS", "TORCHELASTIC_RUN_ID")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "python"),
        ({"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}, "accelerate launch --num_processes 1"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes 2 --nproc_per_node 8",
        ),
    ],
)
def test_the_command_is_what_was_run(monkeypatch, variables, words):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["rl/grpo.py", "--config", "my recipe.yaml"])
    assert command() == f"{words} rl/grpo.py --config 'my recipe.yaml'"


def test_the_revision_is_that_of_the_own_checkout_alone(tmp_path):
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    assert revision(tmp_path) is None
    (tmp_path / "file").write_text("of another project")
    own = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "file"], [*own, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert revision(tmp_path) == told.stdout[:12]
    assert revision(installed) is None
