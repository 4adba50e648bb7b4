import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.rewards.registry import get_rewards
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.validate import HIGH, check_reports, check_rewards, constant_answers, read_texts

ROOT = Path(__file__).parents[2]
CARCINOMA = "Diagnosis: carcinoma\nGrade: 2\nNecrosis: absent\nQuadrant: upper left\nMargin: clear"


def case(number: int, answer: str, task: str = "choice", **more) -> Case:
    options = ("benign", "malignant") if task == "choice" else None
    more = {"options": options, **more}
    return Case(
        id=f"c{number}",
        patient=f"p{number}",
        task=task,
        prompt="What is it?",
        answer=answer,
        images=("a.png",),
        **more,
    )


def mixed() -> list[Case]:
    found = [case(i, "malignant" if i % 4 == 0 else "benign") for i in range(8)]
    found += [
        case(8, CARCINOMA, "synoptic", protocol="simulator"),
        case(9, "Diagnosis: normal", "synoptic", protocol="simulator"),
    ]
    return [*found, case(10, "[[100, 100, 300, 300]]", "detection")]


def test_gold_scores_one_and_constants_are_shown():
    findings = check_rewards(mixed(), get_rewards(["choice", "synoptic", "ap50", "format"]))
    assert not findings["failed"] and findings["problems"] == []
    rewards = findings["rewards"]
    assert [rewards[name]["n"] for name in ("choice", "synoptic", "ap50", "format")] == [8, 2, 1, 11]
    assert all(rewards[name]["gold"] == 1 for name in rewards)
    assert rewards["choice"]["constants"]["commonest answer"] == rewards["choice"]["constants"]["option 1"] == 0.75
    assert rewards["choice"]["constants"]["all answers"] == 0
    synoptic = rewards["synoptic"]["constants"]
    for name in ("nothing", "all not applicable", "all cannot be determined", "all values of each field"):
        assert synoptic[name] == 0
    assert rewards["ap50"]["constants"]["no box"] == rewards["ap50"]["constants"]["whole image"] == 0


def test_a_hackable_reward_is_marked(tmp_path, capsys):
    from frugalpath.rewards.validate import _print_rewards

    (tmp_path / "own.py").write_text(
        "def talk(completions):\n    return [float(len(str(c)) > 60) for c in completions]\n"
    )
    cases = [case(i, "benign") for i in range(3)]
    findings = check_rewards(cases, get_rewards(["choice", "own.py:talk"], base=tmp_path))
    assert findings["rewards"]["choice"]["constants"]["commonest answer"] == 1.0 >= HIGH
    assert findings["failed"]  # gold does not score 1 under `talk`
    assert "c0" in findings["problems"][0] and "talk" in findings["problems"][0]
    _print_rewards(findings)
    assert "scores high without the image" in capsys.readouterr().out
    shaping = [{"name": "own.py:talk", "scores": False}]
    findings = check_rewards(cases, get_rewards(["choice", *shaping], base=tmp_path))
    assert not findings["failed"] and findings["rewards"]["talk"]["gold"] == 0
    _print_rewards(findings)
    assert "talk: applies to 3, shapes training only" in capsys.readouterr().out
    assert check_rewards(cases, get_rewards(shaping, base=tmp_path))["failed"]  # nothing scores the cases


def test_cases_without_a_usable_gold_or_a_reward_are_named():
    cases = [case(0, "Diagnosis: unheard of", "synoptic", protocol="simulator"), case(1, "some text", "open")]
    findings = check_rewards(cases, get_rewards(["synoptic"]))
    assert findings["failed"]
    assert {"c0" in findings["problems"][0], "c1" in findings["problems"][1]} == {True}


def test_constant_answers_give_one_answer_a_case():
    cases = mixed()
    assert {len(texts) for texts in constant_answers(cases).values()} == {len(cases)}


REPORTS = [
    "Prostate, biopsy;\n  Acinar adenocarcinoma, Gleason's score 7 (3+4), grade group 2, tumor volume: 10%",
    "Prostate, biopsy;\n  No tumor present",
    "Prostate, biopsy;\n  No tumor present",
    "Some words without a head",
]


def test_reports_that_lose_something_are_listed_with_reasons():
    findings = check_reports(REPORTS, load_protocol("biopsy"))
    assert (findings["n"], findings["unique"]) == (4, 3)
    assert findings["parsed"] == findings["round_trip"] == 0.75
    (problem,) = findings["problems"]
    assert problem["text"] == REPORTS[-1] and "no organ" in problem["reasons"]


def test_reports_that_contradict_themselves_are_counted():
    wrong = REPORTS[0].replace("grade group 2", "grade group 3")
    findings = check_reports([wrong, wrong, REPORTS[0]], load_protocol("biopsy"))
    assert findings["round_trip"] == 1
    assert findings["contradictions"] == {
        "Diagnoses, 1: Grade group: '3' does not agree with the other fields, which give 2": 2
    }


def test_texts_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_text(json.dumps({"report": "a"}) + "\n" + json.dumps({"text": "b"}) + "\n")
    with pytest.raises(InputError, match=r"reports\.jsonl, line 2.*--column"):
        read_texts(str(path), "report")
    with pytest.raises(InputError, match="no file"):
        read_texts(str(tmp_path / "none.jsonl"), "report")


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "frugalpath.rewards.validate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_line(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_text("".join(json.dumps({"report": text}) + "\n" for text in REPORTS))
    done = run("--reports", str(path), "--protocol", "biopsy", "--sample", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "round trip: 75.00% of the reports" in done.stdout and "no organ" in done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["unique"] == 3
    wrong = run("--reports", str(path))
    assert wrong.returncode == 2 and "--protocol" in wrong.stderr


@pytest.mark.slow
def test_a_reward_that_breaks_its_contract_is_one_line_and_status_2(tmp_path):
    (tmp_path / "own.py").write_text(
        "def few(completions):\n    return [1.0]\ndef words(completions):\n    return ['1' for _ in completions]\n"
    )
    rows = [
        {"id": i, "patient": i, "images": ["a.png"], "task": "open", "prompt": "What?", "answer": "b"} for i in "xyz"
    ]
    manifest = tmp_path / "cases.jsonl"
    manifest.write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name, told in (
        ("few", "error: reward 'few' returned 1 values for 3 completions; return one for each"),
        ("words", "error: reward 'words' returned str '1' for completion 0; return a number, or None where the"),
    ):
        done = run("--manifest", str(manifest), "--rewards", f"{tmp_path / 'own.py'}:{name}")
        assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr


DATA = ROOT.parent / "shared" / "data" / "reports" / "biopsy_reports.jsonl"


@pytest.mark.skipif(not DATA.exists(), reason="the real reports are not here")
def test_real_reports_parse_and_round_trip():
    findings = check_reports(read_texts(str(DATA), "report"), load_protocol("biopsy"))
    assert findings["parsed"] >= 0.98 and findings["parsed_unique"] >= 0.98
    assert findings["round_trip"] >= 0.95 and findings["round_trip_unique"] >= 0.95
