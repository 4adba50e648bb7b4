"""What docs/slide_models.md shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from frugalpath.models.build import PerformerConfig
from frugalpath.models.compressors.aligner import ALIGNERS, MARKERS
from frugalpath.models.compressors.chain import COMPRESSORS, make_compressor
from frugalpath.recipe.sft import STAGES, read_stages
from frugalpath.sft.supervised import PARTS, stage_rates
from frugalpath.values import checked

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "slide_models.md").read_text()


def test_its_recipes_are_valid():
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.S)]
    assert len(blocks) == 2
    performer = checked(PerformerConfig, blocks[0]["performer"], "performer")
    width = 1280
    for spec in performer.compressors:
        width = make_compressor(spec, width, 64).out_dim
    assert performer.aligner in ALIGNERS and performer.markers in MARKERS
    stages = read_stages(blocks[1]["sft"])
    assert [stage.kind for stage in stages] == ["mae", "align", "case"]
    assert stage_rates("case", stages[2].options["learning_rates"])


@pytest.mark.parametrize(
    ("names", "heading"), [(COMPRESSORS, "## Compressors"), (STAGES, "## Stages")], ids=["compressors", "stages"]
)
def test_its_tables_are_complete(names, heading):
    section = TEXT.split(heading)[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == set(names)


def test_its_parts_and_recipes_exist():
    assert all(f"{part}:" in TEXT for part in PARTS)
    recipes = re.findall(r"`(\w+)\.yaml`", TEXT)
    assert len(recipes) == 4
    for name in recipes:
        assert (ROOT / "configs" / "recipes" / f"{name}.yaml").is_file()
        assert (ROOT / "configs" / "recipes" / f"{name}_tiny.yaml").is_file()
