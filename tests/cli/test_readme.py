"""The README's reward, exactly as it stands there, through the recipe line that names it."""

from __future__ import annotations

import re

import yaml

from frugalpath.rewards.registry import get_rewards
from tests.cli.conftest import ROOT


def test_the_reward_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"<!-- example: my_rewards.py -->\n```python\n(.*?)```", text, re.S)
    line = re.search(r"```yaml\n(rewards: .*?)```", text, re.S)
    (tmp_path / "my_rewards.py").write_text(code[1])
    choice, brevity = get_rewards(yaml.safe_load(line[1])["rewards"], base=tmp_path)
    assert (choice.weight, brevity.weight) == (1.0, 0.2)
    assert (choice.score_weight, brevity.score_weight) == (1.0, 0.0)
    short, long = ("<think></think><answer>" + "a" * n + "</answer>" for n in (20, 40))
    assert brevity(completions=[short, long, "nothing"]) == [1.0, 0.5, 0.0]
