"""deploy/answer.py as a user calls it, on a finished run and on the few folders of it that are deployed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import frugalpath.deploy.answer
from frugalpath.rewards.answer import extract_answer
from tests.cli.conftest import ROOT, call, command

pytestmark = pytest.mark.slow


def report(recipe: Path) -> dict:
    return json.loads((recipe.parent / "run" / "report" / "summary.json").read_text())


@pytest.fixture
def answer(called):
    """Asks the run of a recipe in this process, see `called`."""
    return lambda recipe, *extra: called(frugalpath.deploy.answer.main, "--config", recipe, *extra)


@pytest.fixture(scope="module")
def deployed(finished, tmp_path_factory) -> tuple[str, ...]:
    """Arguments that take the run from a folder of what answering needs, and the cases from nowhere."""
    run, folder = finished[0].parent / "run", tmp_path_factory.mktemp("deployed")
    for part in ("grpo", "allocator", "report"):
        shutil.copytree(run / part, folder / part, ignore=shutil.ignore_patterns("checkpoint-*"))
    return "--output_dir", str(folder), "--set", f"cases.folder={folder / 'nowhere'}"


@pytest.fixture(scope="module")
def sources(finished, slides) -> tuple[Path, Path]:
    """A slide of the run, and the feature file of another one."""
    slide = min((slides / "slides").glob("*.tif"))
    feature = max((finished[0].parent / "run" / "features" / "slides" / "features").glob("*.h5"))
    return slide, feature


def rows_of(text: str) -> list[dict]:
    return [json.loads(row) for row in text.splitlines()]


def test_the_test_split_reproduces_the_report(finished):
    done = call("deploy/answer.py", finished[0], "--split", "test", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    *rows, last = rows_of(done.stdout)
    found, summary = last["totals"], report(finished[0])
    point = summary["operating_point"]
    assert (found["price"], found["n"], found["scored"]) == (point["price"], point["n"], point["n"])
    assert (found["score"], found["tokens"]) == (point["accuracy"], point["tokens"])
    assert found["flops"] == pytest.approx(point["flops"]) and found["flops_stage1"] == point["flops_stage1"]
    assert found["budgets"] == {b: n for b, n in summary["chosen"].items() if n}
    cases = [json.loads(r) for r in (finished[0].parent / "run/report/cases.jsonl").read_text().splitlines()]
    for row, case in zip(rows, cases, strict=True):
        shared = ("id", "budget", "completion", "score", "tokens", "prompt_tokens", "generated_tokens")
        assert [row[k] for k in shared] == [case[k] for k in shared]
        assert row["flops_stage1"] + row["flops_stage2"] == pytest.approx(case["flops"])
        assert row["latency_ms_stage1"] > 0 and row["latency_ms_stage2"] > 0


@pytest.mark.parametrize("by", ["price", "budget"])
def test_other_points_of_the_report(finished, answer, by):
    """The price of the most mixed budgets, and a fixed budget."""
    summary = report(finished[0])
    points = summary["allocator"] if by == "price" else summary["static"]
    point = max(points, key=lambda p: p["tokens"] % 1 + (p["tokens"] == 4))
    status, out, _ = answer(finished[0], "--split", "test", f"--{by}", point[by])
    assert status == 0
    closing = out.splitlines()[-1]
    assert f"mean score {point['accuracy']:.4f} of {point['n']}" in closing
    assert f"{point['tokens']:.1f} tokens" in closing and f"{point['flops']:.3e} FLOPs" in closing


def test_a_deployed_run_answers_about_slides_and_feature_files(finished, deployed, sources, answer, tmp_path):
    args = [*deployed, "--slide", *sources, "--question", "What is the diagnosis?"]
    status, out, err = answer(finished[0], *args, "--json", "--out", tmp_path / "answers.jsonl")
    assert status == 0, err
    (row,) = rows_of(out)
    assert row["looks"] == [row["budget"]] and row["budget"] in (1, 4, 16) and 0 < row["tokens"] <= row["budget"]
    assert 0 < row["confidence"] <= 1 and row["flops_stage1"] > 0 and row["flops_stage2"] > 0
    assert row["answer"] in row["completion"] and "score" not in row
    assert rows_of((tmp_path / "answers.jsonl").read_text()) == [row]
    assert not (Path(deployed[1]) / "features").exists(), "features went to a temporary folder"
    status, out, _ = answer(finished[0], *args, "--budget", 16)
    head, line = out.splitlines()
    assert head.split()[:2] == ["budget", "tokens"] and line.split()[:2] == ["16", "16"]


def test_a_deployed_run_answers_about_a_field(finished, deployed, answer, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8)).save(tmp_path / "a.png")
    status, out, err = answer(
        finished[0],
        *deployed,
        "--image",
        tmp_path / "a.png",
        "--question",
        "?",
        "--budget",
        4,
        "--kind",
        "k",
        "--json",
    )
    assert status == 0, err
    (row,) = rows_of(out)
    assert (row["id"], row["question"], row["budget"], row["tokens"], row["flops_stage1"]) == ("a", "k", 4, 4, 0)


def test_a_deployed_run_answers_a_manifest(finished, deployed, sources, answer, tmp_path):
    question = {"task": "choice", "prompt": "What is the diagnosis?", "options": ["benign", "carcinoma"]}
    lines = [{"slides": str(path), **question} for path in sources]
    lines[1]["answer"] = "carcinoma"
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    args = [*deployed, "--manifest", tmp_path / "new.jsonl", "--root", "/", "--price", 0.05, "--json"]
    status, out, err = answer(finished[0], *args)
    assert status == 0, err
    *rows, last = rows_of(out)
    assert [row["id"] for row in rows] == ["new:1", "new:2"]
    assert "score" not in rows[0] and rows[1]["score"] == (rows[1]["answer"] == "carcinoma")
    assert (last["totals"]["n"], last["totals"]["scored"], last["totals"]["price"]) == (2, 1, 0.05)


@pytest.mark.parametrize(
    ("extra", "messages"),
    [
        ([], ["one of --image/--slide, --manifest and --split"]),
        (["--split", "test", "--image", "a.png", "--question", "?"], ["one of --image/--slide"]),
        (["--slide", "a.svs", "--price", "-1", "--budget", "4"], ["--question", "give only one", "at least 0"]),
        (
            ["--split", "test", "--options", "a", "b", "--kind", "x"],
            ["--options: cases of --split", "--kind: cases of --split"],
        ),
        (["--split", "test", "--budget", "99"], ["0..16"]),
        (["--image", "nowhere.png", "--question", "?"], ["nowhere.png: cannot be read"]),
        (["--manifest", "nowhere.jsonl"], ["no manifest nowhere.jsonl"]),
        (["--slide", "README.md", "--question", "?"], ["README.md", "nothing is left to show"]),
        (["--split", "test", "--set", "encoder.mpp=1.0"], ["other settings (encoder.mpp)"]),
        (["--split", "test", "--output_dir", "nowhere"], ["no grpo/done.json", "frugalpath grpo --config"]),
    ],
)
def test_bad_arguments_are_status_2(finished, answer, monkeypatch, extra, messages):
    monkeypatch.chdir(ROOT)
    status, out, err = answer(finished[0], *extra)
    assert status == 2 and out == ""
    for message in messages:
        assert message in err


def test_what_is_missing_is_named_with_its_command(finished, deployed, answer, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(deployed[1], folder)
    question = ["--output_dir", folder, "--slide", ROOT / "README.md", "--question", "?"]
    (folder / "report" / "summary.json").unlink()
    status, _, err = answer(finished[0], *question)
    assert status == 2 and "give --price or --budget" in err and "frugalpath pareto --config" in err
    (folder / "allocator" / "decider.json").unlink()
    status, _, err = answer(finished[0], *question, "--price", 0.1)
    assert status == 2 and "no allocator/decider.json" in err and "frugalpath pareto --config" in err


def test_the_code_of_the_docs_runs(finished, deployed, sources, tmp_path, monkeypatch, capsys):
    code = re.search(
        r"<!-- example: decide.py -->\n```python\n(.*?)```", (ROOT / "docs" / "pareto.md").read_text(), re.S
    )
    recipe = [*command("", finished[0])[-2:], *deployed]
    text = code[1].replace('["--config", "recipe.yaml"]', repr(recipe))
    for name, source in zip(("a.svs", "b.svs"), sources, strict=True):
        text = text.replace(name, str(source))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(text, "decide.py", "exec"), names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{extract_answer(names['answered'].text)} {names['answered'].budget} ") and second
    assert names["answered"].budget in (1, 4, 16) and len(list((tmp_path / "features").rglob("*.h5"))) == 1


@pytest.mark.parametrize("page", ["README.md", "docs/pareto.md"])
def test_commands_of_the_docs_are_understood(page):
    found = re.findall(r"^ *frugalpath answer (.*?)(?:  #.*)?$", (ROOT / page).read_text(), re.M)
    assert found
    for text in found:
        args, rest = frugalpath.deploy.answer.parse(shlex.split(text))
        frugalpath.deploy.answer.check(args, rest)
        assert rest == ["--config", "RECIPE"]
