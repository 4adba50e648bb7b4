"""What users install and start: the wheel by itself, the scripts of a checkout under accelerate, the one command."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from frugalpath.cli import COMMANDS
from tests.cli.conftest import ENVIRONMENT, ROOT

SOURCES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
"""Folder of the repository by package."""
LEFT_OUT = (".*", "*.egg-info", "__pycache__", "build", "data", "docs", "runs", "shared", "site", "tests", "wheels")
ALONE = """\
import importlib, sys
sys.meta_path[:] = [f for f in sys.meta_path if not f.__module__.startswith("__editable__")]
import frugalpath.cli
from frugalpath.rewards.synoptic.protocol import load_protocol
for module, _ in frugalpath.cli.COMMANDS.values():
    importlib.import_module(module)
strays = [m.__file__ for n, m in sys.modules.items() if n.startswith("frugalpath") and not m.__file__.startswith(HERE)]
assert not strays, strays
assert load_protocol("simulator").fields
print("imported", flush=True)
frugalpath.cli.main()
"""
"""A program that knows nothing of an editable install, imports every command from the folder HERE and runs one."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing of an earlier build comes in and nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*LEFT_OUT))
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    (made,) = folder.glob("*.whl")
    return made


def pip(command: str, *options: object) -> None:
    words = [sys.executable, "-m", "pip", command, "-q", "--no-deps", "--no-index", *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe that has a key which there is not: telling of it takes all imports and nothing else."""
    path = tmp_path / "recipe.yaml"
    path.write_text("cases: {name: simulator, folder: nowhere}\nallocater: {}\n")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    strays = {n for n in names if not n.startswith("frugalpath/") and not n.split("/")[0].endswith(".dist-info")}
    assert not strays
    code = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in SOURCES.items()
        for path in (ROOT / folder).glob("*.py")
    }
    assert {n for n in names if n.endswith(".py")} == code
    kept = {
        "rl",
        "sft",
        "slides",
        "envs",
        "models",
        "rewards",
        "recipe",
        "allocator",
        "evaluation",
        "deploy",
        "doctor",
    }
    every = {p.relative_to(ROOT).as_posix() for folder in kept for p in (ROOT / folder).rglob("*.py")}
    assert {f"frugalpath/{name}" for name in every} <= code, "a folder is missing from the packages of pyproject.toml"
    report = {p.name for p in (ROOT / "evaluation" / "report").iterdir() if p.suffix in (".j2", ".css", ".js")}
    assert {"page.html.j2", "card.md.j2", "page.css", "page.js"} <= report
    assert {f"frugalpath/evaluation/report/{name}" for name in report} <= names
    assert {"frugalpath/evaluation/report/plotly/plotly-basic.min.js", "frugalpath/doctor/configs.json"} <= names
    protocols = {p.name for p in (ROOT / "configs" / "protocols").glob("*.yaml")}
    assert protocols and {f"frugalpath/configs/protocols/{name}" for name in protocols} <= names


@pytest.mark.slow
def test_the_wheel_runs_by_itself(wheel, recipe, tmp_path):
    folder = tmp_path / "installed"
    pip("install", "--target", folder, wheel)
    code = ALONE.replace("HERE", repr(f"{folder}{os.sep}"))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", code, "grpo", "--config", recipe],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout.startswith("imported"), done.stderr[-3000:]
    assert done.returncode == 2, done.stderr[-3000:]
    assert "unknown key 'allocater'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_the_script_starts_under_accelerate(recipe, tmp_path, place):
    script = "rl/grpo.py" if place == "checkout" else str(ROOT / "rl" / "grpo.py")
    launch = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, script, "--config", str(recipe)],
        cwd=ROOT if place == "checkout" else tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode != 0 and "error: " in done.stderr, done.stderr[-3000:]
    assert "unknown key 'allocater'" in done.stderr


def test_help_is_told_at_once():
    code = (
        "import sys; from frugalpath.cli import main; main()\n"
        "heavy = {'torch', 'numpy', 'transformers', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):  # the fastest: others may be at work here
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert min(seconds) <= 1


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_module_with_a_main(name):
    spec = importlib.util.find_spec(COMMANDS[name][0])
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
