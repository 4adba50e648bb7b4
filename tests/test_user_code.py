"""Modules and files of the user's that name packages as earlier versions had them, at the top."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import frugalpath.rewards.label
import frugalpath.rewards.text
from frugalpath.errors import InputError
from frugalpath.recipe.cache_key import reward_digest
from frugalpath.rewards.calling import find
from frugalpath.user_code import current_name, load_user_module

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def not_told_yet() -> None:
    current_name.cache_clear()


@pytest.fixture(params=["installed", "checkout"])
def on_path(request, monkeypatch) -> None:
    """With and without the checkout on the path, where the packages would be found a second time."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    if request.param == "checkout":
        monkeypatch.syspath_prepend(str(ROOT))


def test_a_former_name_finds_the_module_of_today_and_is_told_once(on_path, caplog):
    with caplog.at_level(logging.WARNING, logger="frugalpath"):
        for _ in range(2):
            assert load_user_module("rewards.text", "reward 'rewards.text:f'") is frugalpath.rewards.text
    (told,) = caplog.messages
    assert "rewards.text is the former name" in told and "write frugalpath.rewards.text" in told
    assert find("rewards.label:find_option")[2] is frugalpath.rewards.label.find_option
    assert "rewards" not in sys.modules, "there is no second copy"


def test_a_run_of_a_former_name_keeps_its_digest(on_path, tmp_path):
    digests = [
        reward_digest(SimpleNamespace(rewards=[name], base=tmp_path))
        for name in ("rewards.text:f", "frugalpath.rewards.text:f", "frugalpath.rewards.label:f")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_a_package_of_the_users_own_may_be_called_like_a_former_one(tmp_path):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").touch()
    (tmp_path / "rewards" / "text.py").write_text("def mine(completions):\n    return [1.0 for _ in completions]\n")
    code = (
        "from frugalpath.rewards.calling import find\n"
        "name, source, function = find('rewards.text:mine')\n"
        "assert (source, function(['a'])) == ('rewards.text:mine', [1.0])\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "former name" not in done.stderr


@pytest.mark.parametrize("name", ["rewards.nowhere", "models.allocators.value", "rewards.nowhere.deep"])
def test_what_is_not_there_under_either_name_is_told_by_the_one_that_was_given(on_path, name):
    with pytest.raises(InputError, match=rf"reward 'r': no module '{name.split('.')[0]}.*check the name"):
        load_user_module(name, "reward 'r'")


@pytest.mark.parametrize("imports", ["from rewards.registry import reward", "import models.build"])
def test_a_file_that_imports_a_former_name_is_told_the_present_one(on_path, tmp_path, imports):
    (tmp_path / "mine.py").write_text(f"{imports}\n\n\ndef score(completions):\n    return [1.0]\n")
    top = imports.split()[1].split(".")[0]
    for _ in range(2):
        with pytest.raises(InputError, match=rf"mine\.py.*imported below frugalpath: from frugalpath\.{top}…"):
            load_user_module("mine.py", "reward 'mine.py:score'", tmp_path)
    assert top not in sys.modules
    (tmp_path / "mine.py").write_text("from frugalpath.rewards.registry import reward\n")
    assert load_user_module("mine.py", "reward", tmp_path).reward.__name__ == "reward"


def test_another_package_that_a_file_misses_is_its_own_error(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_user_module("mine.py", "reward", tmp_path)
