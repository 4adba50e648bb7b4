"""The run on a GPU, rehearsed on a CPU: parts that fail, are too slow or killed leave the lines of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu_parts import table
from benchmarks.gpu_parts.plan import PARTS, Part, chosen
from benchmarks.gpu_parts.running import ABSENT, DONE, FAILED, LATE, SHORT, SKIPPED, SPARE, Lines, run

ROOT = Path(__file__).parents[2]
SOME = ["environment", "exactness", "encoding", "estimate", "7b_256_ours", "fit"]
"""In the order of the plan; nothing is there for `estimate` to compare with."""


def start(out: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "benchmarks/gpu.py", "--rehearse", "--out", str(out), *options],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def lines_of(out: Path) -> list[dict[str, Any]]:
    path = out / "gpu.jsonl"
    return table.read(path) if path.exists() else []


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, int, str]:
    """Folder of a rehearsal, its exit status and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    process = start(out, "--parts", ",".join(SOME))
    printed, errors = process.communicate(timeout=280)
    assert "Traceback" not in errors, errors
    return out, process.returncode, printed


@pytest.mark.slow
def test_a_part_that_fails_is_a_line_and_the_others_go_on(rehearsed):
    out, status, printed = rehearsed
    ends = [line for line in lines_of(out) if line["status"] != "measured"]
    assert [line["part"] for line in ends] == SOME
    assert [line["status"] for line in ends] == [DONE, DONE, DONE, FAILED, DONE, ABSENT]
    assert "no steps of ours" in ends[3]["error"] and ends[5]["why"] == "needs a GPU"
    assert status == 1
    rows = printed.splitlines()
    assert [row.split()[0] for row in rows] == SOME
    assert all(f"===== {part}\n" in (out / "gpu.log").read_text() for part in SOME[:-1])
    assert sorted(p.name for p in out.iterdir()) == ["gpu.jsonl", "gpu.log"], "nothing is left of the parts"


@pytest.mark.slow
def test_what_is_measured_says_where_and_agrees(rehearsed):
    measured = {}
    for line in lines_of(rehearsed[0]):
        if line["status"] == "measured":
            assert line["rehearsal"] is True
            measured[line["part"], line["case"]] = line
    facts = measured["environment", "facts"]
    assert facts["versions"]["torch"] and facts["device"] == "cpu" and facts["cores"] == os.cpu_count()
    exact = measured["exactness", "float32 sdpa"]
    assert 0 < exact["max_logp_diff"] < 1e-5 and 0 < exact["max_grad_rel_diff"] < 1e-4
    rough = measured["exactness", "bfloat16 sdpa"]
    assert rough["max_grad_rel_diff"] > 10 * exact["max_grad_rel_diff"], "it is computed in bfloat16"
    assert rough["stock_from_float32"]["max_grad_rel_diff"] > 10 * exact["max_grad_rel_diff"]
    steps = measured["7b_256_ours", "steps"]
    options = steps["options"]
    written = options["prompts"] * options["group"] * options["completion_tokens"]
    assert (
        steps["step_seconds"] > steps["generate_seconds"] > 0 and steps["step_seconds"] > steps["train_step_seconds"]
    )
    assert steps["step_tokens_per_second"] == pytest.approx(written / steps["step_seconds"], rel=0.01)
    assert 0 < steps["train_step_mfu_measured"] <= steps["train_step_hfu_measured"] < 1
    assert steps["train_step_mfu_sheet"] is None, "a CPU has no data sheet here"
    for encoder in ("efficientnet-lite0", "vit-tiny"):
        assert measured["encoding", f"{encoder} float32"]["min_cosine_to_float32"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_a_run_fills_the_page_and_a_rehearsal_does_not(rehearsed, tmp_path, monkeypatch):
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{table.BEGIN}\nNot measured.\n{table.END}\nafter\n")
    monkeypatch.setattr(table, "PAGE", page)
    with pytest.raises(SystemExit, match="rehearsal"):
        table.write(rehearsed[0])
    lines = [{**line, "rehearsal": False} for line in lines_of(rehearsed[0])]
    # The last line is cut off, as by a machine that was taken away.
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"part": "x", "sta')
    for _ in range(2):  # a second time it replaces what the first wrote
        table.write(tmp_path)
        text = page.read_text()
        assert text.startswith(f"before\n{table.BEGIN}\n") and text.endswith(f"\n{table.END}\nafter\n")
        assert "Not measured." not in text and text.count("| 7b, 4 | ours |") == 1
    steps = next(line for line in lines if line.get("case") == "steps")
    assert f"| {steps['peak_gb']:.1f} |" in text and f"{steps['step_seconds']:.3g} s" in text
    assert "`estimate`: failed: RuntimeError: no steps of ours" in text and "`fit`: not run (needs a GPU)" in text


def test_the_page_has_the_marks():
    before, begin, rest = table.PAGE.read_text().partition(table.BEGIN)
    assert begin and rest.partition(table.END)[1] and table.END not in before


def ended(parts: list[Part], folder: Path, seconds: float) -> list[dict[str, Any]]:
    scratch = folder / "scratch"
    scratch.mkdir()
    lines = Lines(folder / "gpu.jsonl", {"rehearsal": True})
    run(parts, lines, folder, scratch, seconds, True, None)
    assert lines_of(folder) == lines.found
    return lines.found


def test_a_part_is_ended_at_its_limit(tmp_path):
    slow = Part("slow", "a", "environment", 1, 0.05, small={"size": 64, "seconds": 0.01})
    (line,) = ended([slow], tmp_path, 60)
    assert line["status"] == LATE and line["seconds"] < 5


@pytest.mark.slow
def test_parts_that_the_minutes_do_not_suffice_for_are_told(tmp_path):
    begun, not_begun = ended([PARTS[0], PARTS[1]], tmp_path, SPARE + SHORT + 0.5)
    assert begun["part"] == "environment" and not_begun["part"] == "exactness"
    assert begun["status"] == not_begun["status"] == SKIPPED
    assert "did not suffice" in begun["why"] and "s were left" in not_begun["why"]


def test_parts_are_chosen_by_letter_or_name():
    assert chosen(None) == PARTS and len({part.name for part in PARTS}) == len(PARTS)
    assert [part.name for part in chosen("zero3, a")] == ["environment", "zero3"]
    with pytest.raises(SystemExit, match="no part x"):
        chosen("a,x")


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_its_lines_and_no_process(tmp_path):
    """While a part has a process of a launcher's launcher, which is in a session of its own."""
    process = start(tmp_path, "--parts", "environment,fsdp2")
    end, tree = time.monotonic() + 120, []
    root = psutil.Process(process.pid)
    while not any("tests/launch/worker.py" in word for p in tree[1:] for word in p.cmdline()[:4]):
        assert process.poll() is None and time.monotonic() < end, lines_of(tmp_path)
        time.sleep(0.2)
        tree = [root, *root.children(recursive=True)]
    assert len(tree) >= 3 and lines_of(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert psutil.wait_procs(tree, timeout=20)[1] == []
    found = (tmp_path / "gpu.jsonl").read_text()
    assert found.endswith("\n") and [json.loads(line)["part"] for line in found.splitlines()] == 3 * ["environment"]


@pytest.mark.slow
@pytest.mark.skipif("FULL_REHEARSAL" not in os.environ, reason="takes minutes; FULL_REHEARSAL=1 runs it")
@pytest.mark.timeout(500)
def test_every_part_is_reported(tmp_path):
    process = start(tmp_path)
    printed, errors = process.communicate(timeout=450)
    ends = {line["part"]: line for line in lines_of(tmp_path) if line["status"] != "measured"}
    assert list(ends) == [part.name for part in PARTS]
    assert process.returncode == 0, printed + errors
    assert all(line["status"] in (DONE, ABSENT) for line in ends.values()), printed
