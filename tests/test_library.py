"""The names that programs import from `frugalpath`."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import frugalpath

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", frugalpath.__all__)
def test_a_public_name_is_there_and_told(name):
    found = getattr(frugalpath, name)
    assert found.__name__ == name and inspect.getdoc(found)
    for hint in inspect.get_annotations(found.from_pretrained if hasattr(found, "from_pretrained") else found):
        assert hint


def test_type_checkers_find_the_names_where_they_are_imported_from():
    tree = ast.parse((ROOT / "frugalpath" / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    told = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert told == {name: f"frugalpath.{place}" for name, place in frugalpath._PLACES.items()}
    assert sorted(told) == frugalpath.__all__ and len(told) == 10 and set(told) <= set(dir(frugalpath))


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = frugalpath.Trainer  # type: ignore[attr-defined]


def test_what_is_not_asked_for_is_not_imported():
    code = (
        "import sys, frugalpath\n"
        "assert 'Allocator' in dir(frugalpath)\n"
        "heavy = {'torch', 'numpy', 'transformers', 'trl', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from frugalpath import Case, InputError, load_cases, extract_slides\n"
        "assert 'trl' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
