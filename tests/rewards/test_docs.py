"""The examples of docs/rewards.md run as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from frugalpath.rewards.registry import get_rewards

TEXT = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def block(pattern):
    (found,) = re.findall(pattern, TEXT, re.DOTALL)
    return found


def test_the_users_own_reward(tmp_path):
    source = block(r"<!-- example: brevity -->\n```python\n(.*?)```")
    assert len([line for line in source.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_rewards.py").write_text(source)
    recipe = yaml.safe_load(block(r"```yaml\n(.*?)```"))
    choice, brevity = get_rewards(recipe["rewards"], base=tmp_path)
    assert (choice.name, choice.weight) == ("choice", 1.0)
    assert (brevity.name, brevity.weight, brevity.params) == ("brevity", 0.2, {"limit": 40})
    assert (choice.scores, brevity.scores) == (True, False)
    completions = [f"<think>{'word ' * n}</think> <answer>benign</answer>" for n in (2, 37, 56, 100)]
    values = brevity([*completions, "no answer"], answer=["benign"] * 5)
    assert values == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0], abs=0.06)
    assert values == brevity([[{"role": "assistant", "content": text}] for text in [*completions, "no answer"]])


def test_the_test_of_a_reward():
    exec(block(r"## Test it.*?```python\n(.*?)```"), {})
