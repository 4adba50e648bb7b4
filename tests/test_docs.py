"""What the documentation names is there: files, headings, recipes, messages."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RECIPES = ROOT / "configs" / "recipes"
PACKAGES = (
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
EXAMPLES = {"configs/recipes/other.yaml", "allocator/escalate.json"}  # of the reader's own, and of a run
TREE = ("benchmarks", "configs", "docs", "examples", "tests", *PACKAGES)


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths of the repository in commands, code and text."""
    named = re.findall(rf"(?<![\w/.<-])((?:{'|'.join(TREE)})/[\w./-]*\.(?:py|yaml|md|json|png))\b", page.read_text())
    assert not [name for name in set(named) - EXAMPLES if not (ROOT / name).is_file()]


def test_every_page_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in readme]


def test_the_table_of_recipes_is_that_of_the_folder():
    table = (ROOT / "README.md").read_text().split("| recipe of `configs/recipes` | what |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {path.stem for path in RECIPES.glob("*.yaml")}


def test_the_recipe_of_the_readme_is_part_of_the_real_one():
    (text,) = re.findall(
        r"<!-- example: part of pcam.yaml -->\n```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    part, whole = yaml.safe_load(text), yaml.safe_load((RECIPES / "pcam.yaml").read_text())
    assert part.pop("cases").items() <= whole["cases"].items() and part.items() <= whole.items()


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_gold_rollout_of_the_demo_is_told_beside_its_figures(page):
    assert yaml.safe_load((RECIPES / "demo.yaml").read_text())["gold_rollout"]
    figures = {"README.md": "the demo, on simulated slides", "docs/results.md": "## Simulated slides"}[page]
    told = (ROOT / page).read_text().split(figures)[1].split("\n## ")[0]
    assert "`gold_rollout: true`" in told


@cache
def messages() -> list[str]:
    """Every text in the packages' code, with `…` where a value is put in."""

    def text(node: ast.expr) -> str:
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    trees = (ast.parse(path.read_text()) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return [
        text(n) for tree in trees for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant | ast.BinOp)
    ]


def headings() -> list[str]:
    return re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)


@pytest.mark.parametrize("heading", headings())
def test_messages_of_the_page_are_those_of_the_code(heading):
    """Each constant part stands in some text of the code; together they are of one module's message."""
    parts = [part.strip(" ;:?") for part in heading.split("…")]
    parts = [part for part in parts if re.search(r"\w", part)]
    assert parts
    pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
    whole = any(pattern.search(message) for message in messages())
    assert whole or all(any(part in message for message in messages()) for part in parts), heading
