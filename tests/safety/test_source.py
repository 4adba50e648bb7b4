"""What the source may not hold: calls that run what a file says, and pictures that may show a patient's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "benchmarks",
    "frugalpath",
    "slides",
    "envs",
    "rewards",
    "models",
    "recipe",
    "allocator",
    "evaluation",
    "sft",
    "rl",
    "deploy",
    "doctor",
)
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# Rewards in worker processes: what is pickled goes through a pipe from this program to itself.
MAY_PICKLE = {"rewards/workers.py"}
PICTURES = {"associated_images", "associated_image_names", "read_associated_image", "read_associated_image_data"}


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and kind of everything in a module that is not allowed anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.partition(".")[0] in RUNS_CODE:
                    yield node.lineno, "pickle"
        if isinstance(node, ast.Attribute) and node.attr in PICTURES:
            yield node.lineno, "pictures"
        if isinstance(node, ast.Constant) and node.value in PICTURES:
            yield node.lineno, "pictures"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keys = {key.arg: ast.unparse(key.value) for key in node.keywords}
        if called in ("torch.load", "torch.hub.load") and keys.get("weights_only") != "True":
            yield node.lineno, "torch.load"
        if called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
            yield node.lineno, "yaml.load"
        if called in ("eval", "exec", "os.system", "os.popen") or keys.get("shell") == "True":
            yield node.lineno, "eval"
        if "True" in (keys.get("allow_pickle"), keys.get("trust_remote_code")):
            yield node.lineno, "trust"
        if called == "Image.open":
            yield node.lineno, "image"
        if called == "read_pickle" or called.endswith(".read_pickle"):
            yield node.lineno, "pickle"


ALLOWED = {("slides/images.py", "image"), *((file, "pickle") for file in MAY_PICKLE)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_forbidden(path):
    name = path.relative_to(ROOT).as_posix()
    found = {(line, kind) for line, kind in forbidden(ast.parse(path.read_text(encoding="utf-8")))}
    assert [f"{name}:{line} {kind}" for line, kind in sorted(found) if (name, kind) not in ALLOWED] == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("import pickle", "pickle"),
        ("from joblib import load", "pickle"),
        ("pandas.read_pickle(path)", "pickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("np.load(path, allow_pickle=True)", "trust"),
        ("AutoModel.from_pretrained(name, trust_remote_code=True)", "trust"),
        ("subprocess.run(line, shell=True)", "eval"),
        ("eval(text)", "eval"),
        ("Image.open(path)", "image"),
        ("slide.associated_images['label']", "pictures"),
        ("getattr(slide, 'associated_images')", "pictures"),
    ],
)
def test_what_is_looked_for_is_found(line, kind):
    assert [found for _, found in forbidden(ast.parse(line))] == [kind]


def test_no_code_of_a_hub_runs_unless_it_is_asked_for():
    from frugalpath.recipe.run import EncoderConfig
    from frugalpath.slides.options import ExtractOptions

    assert not EncoderConfig().trust_remote_code and not ExtractOptions().trust_remote_code


def test_completions_are_not_logged_by_default():
    from frugalpath.recipe.grpo import FrugalConfig

    assert FrugalConfig.__dataclass_fields__["log_completions"].default is False
