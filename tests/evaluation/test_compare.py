from __future__ import annotations

import copy
import json
import sys

import pytest

import frugalpath.evaluation.compare
from frugalpath.errors import InputError
from frugalpath.evaluation.compare import compare, read_run


def write_run(folder, scores, accuracy=0.5):
    """A finished run of made-up points whose cases scored so."""
    point = {"accuracy": accuracy, "ci95": [accuracy - 0.1, accuracy + 0.1], "tokens": 4.0, "flops": 1e9}
    gain = {"value": 0.2, "ci95": [0.1, 0.3]}
    summary = {
        "n": len(scores),
        "n_patients": len(scores),
        **{key: point for key in ("operating_point", "text_only", "majority")},
        **{key: [point, {**point, "flops": 2e9}] for key in ("static", "allocator", "random")},
        "headline": {"gain_over_text_only": gain, "gain_over_majority": gain},
        "git": "abc",
        "command": "rl/grpo.py",
    }
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "summary.json").write_text(json.dumps(summary))
    rows = [{"id": f"c{i}", "patient": f"p{i}", "score": s} for i, s in enumerate(scores)]
    (folder / "report" / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_differences_are_paired_by_case(tmp_path):
    runs = [write_run(tmp_path / "a", [0.0, 1.0] * 10), write_run(tmp_path / "b", [0.5, 1.0] * 10)]
    found = compare([read_run(run) for run in runs])
    assert found["n"] == 20 and list(found["runs"]) == ["a", "b"]
    assert found["runs"]["a"]["over_a"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    other = found["runs"]["b"]["over_a"]
    assert other["value"] == 0.25 and 0 < other["ci95"][0] < 0.25 < other["ci95"][1] < 0.5


def test_runs_of_one_name_are_refused(tmp_path):
    runs = [read_run(write_run(tmp_path / parent / "run", [1.0] * 4)) for parent in "ab"]
    with pytest.raises(InputError, match=r"two folders have the same name \(run, run\)"):
        compare(runs)


def test_a_report_of_an_earlier_version_is_refused(tmp_path):
    file = write_run(tmp_path / "a", [1.0] * 4) / "report" / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "headline": {}}))
    with pytest.raises(InputError, match=r"summary\.json: written by an earlier version"):
        read_run(tmp_path / "a")


def test_runs_on_other_cases_are_refused(tmp_path):
    first, second = (read_run(write_run(tmp_path / name, [1.0] * 4)) for name in "ab")
    other = copy.deepcopy(second)
    other["cases"]["c9"] = other["cases"].pop("c0")
    with pytest.raises(
        InputError, match="b: 2 test cases differ from those of a, such as c0; compare runs on the same"
    ):
        compare([first, other])


def test_the_entry_writes_one_picture(tmp_path, monkeypatch, capsys):
    runs = [str(write_run(tmp_path / name, [1.0, 0.0])) for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", *runs, "--out", str(tmp_path / "out")])
    frugalpath.evaluation.compare.main()
    told = capsys.readouterr().out
    assert "one" in told and "two" in told and "2 test questions of 2 patients" in told
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]["two"]["git"] == "abc"


def test_an_unfinished_run_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        frugalpath.evaluation.compare.main()
    assert stopped.value.code == 2 and "run `frugalpath grpo`" in capsys.readouterr().err
