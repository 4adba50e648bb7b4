"""Layouts in which a report may be written, and what a policy may write instead of one."""

import json
import time

import pytest

from frugalpath.rewards.synoptic.parse import MAX_CHARS, parse_report, read_record
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.report import split_outside
from frugalpath.rewards.synoptic.reward import synoptic

SIMULATOR, BIOPSY = load_protocol("simulator"), load_protocol("biopsy")
RECORD = {"diagnosis": "carcinoma", "grade": "2", "quadrant": "upper left", "tumour_size_mm": 12}
GOLD = "Diagnosis: carcinoma\nGrade: 2\nQuadrant: upper left\nTumor size: 12 mm"
PROMPT = """Write a synoptic report of the slide. Answer with one line for each field that applies:
Diagnosis: normal | adenoma | carcinoma
Grade: 1 | 2 | 3
Quadrant: upper left | upper right | lower left | lower right
Tumor size: <number> mm"""


def earned(text, gold=GOLD, protocol="simulator"):
    (value,) = synoptic([f"<answer>{text}</answer>"], answer=[gold], protocol=[protocol])
    return value


@pytest.mark.parametrize(
    "text",
    [
        GOLD,
        GOLD.replace("\n", "\r\n"),
        f"\n\n{GOLD}\n\n",
        f"TUMOR\n{GOLD}",
        f"## Tumor\n{GOLD}",
        f"**Tumor:**\n{GOLD}",
        "\n".join(f"- {line}" for line in GOLD.splitlines()),
        "\n".join(f"{i}. {line}" for i, line in enumerate(GOLD.splitlines(), 1)),
        "\n".join("* **{}:** {}".format(*line.split(": ")) for line in GOLD.splitlines()),
        "\n".join("**{}**: {}".format(*line.split(": ")) for line in GOLD.splitlines()),
        f"```\n{GOLD}\n```",
        f"```text\n{GOLD}\n```",
        GOLD.replace("Tumor size: 12 mm", "Tumour size (mm): 12"),
        GOLD.replace("Tumor size: 12 mm", "Tumour size (cm): 1.2"),
        GOLD.replace("Tumor size", "tumour_size_mm"),
        json.dumps(RECORD),
        json.dumps(RECORD, indent=2),
        f"```json\n{json.dumps(RECORD)}\n```",
        json.dumps({"Tumor": RECORD}),
        json.dumps({"Diagnosis": "Carcinoma", "GRADE": 2, "Quadrant": "Upper left", "tumor size": "1.2 cm"}),
    ],
)
def test_one_report_in_many_layouts(text):
    report = parse_report(text, SIMULATOR)
    assert (report.record, report.problems, report.readable) == (RECORD, [], True)


@pytest.mark.parametrize(
    "text",
    [
        f"{GOLD}\nGrade: 2",
        f"{GOLD}\nGrade: 3",
        '{"diagnosis": "carcinoma", "grade": "2", "grade": "2"}',
        '{"diagnosis": "carcinoma", "grade": "2", "tumor": {"Grade": "3"}}',
    ],
)
def test_a_field_that_is_answered_twice_has_no_answer(text):
    report = parse_report(text, SIMULATOR)
    assert "grade" not in report.record and report.repeated and not report.readable
    assert "Grade: answered more than once" in report.problems and earned(text) == 0.0


def test_what_belongs_to_no_field_is_told():
    report = parse_report("Colour: blue\nGrade: 2\nas seen", SIMULATOR)
    assert report.record == {"grade": "2"} and report.unknown == ["Colour: blue", "as seen"]
    report = parse_report('{"colour": "blue", "grade": 2}', SIMULATOR)
    assert report.record == {"grade": "2"} and report.unknown == ["colour"]
    assert parse_report("", SIMULATOR).problems == ["no field is answered"]


def test_what_cannot_be_read_is_told_and_is_no_answer():
    report = parse_report("Grade: blue\nTumor size: large\nDiagnosis:", SIMULATOR)
    assert report.record == {"diagnosis": None} and set(report.unreadable) == {"grade", "tumour_size_mm"}
    assert any("'blue' is not one of 1, 2, 3" in problem for problem in report.problems)


def test_entries_of_lists():
    text = "Diagnoses:\n- tubular adenoma; Low or high grade: low\n- Diagnosis: duct ectasia\nNotes: none seen"
    report = parse_report(text, BIOPSY)
    wanted = [{"diagnosis": "tubular adenoma", "tier": "low"}, {"diagnosis": "duct ectasia"}]
    assert (report.record, report.problems) == ({"diagnoses": wanted, "notes": "none seen"}, [])


@pytest.mark.parametrize("part", ["Low or high grade: high", "Colour: blue", "something"])
def test_a_strange_part_spoils_the_list(part):
    report = parse_report(f"Diagnoses:\n- tubular adenoma; Low or high grade: low; {part}", BIOPSY)
    assert list(report.unreadable) == ["diagnoses"]


def test_parts_are_split_outside_brackets_and_quotation_marks():
    assert split_outside('a (b; c); "d; \\"e;"; [f;] ; g)', ";") == ["a (b; c)", '"d; \\"e;"', "[f;]", "g)"]


def test_a_row_of_a_table_is_read_as_a_report():
    assert read_record({"Diagnosis": "Adenoma", "Tumor size": 3, "colour": 1}, SIMULATOR).record == {
        "diagnosis": "adenoma",
        "tumour_size_mm": 3,
    }


@pytest.mark.parametrize("text", [PROMPT, f"{PROMPT}\n{PROMPT}", f"{PROMPT}\n{GOLD}", f"{GOLD}\n{PROMPT}"])
def test_an_echo_of_the_prompt_earns_nothing(text):
    assert earned(text) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 100_000,
        '{"a":' * 2_000,
        '{"a":' * 1_900 + "1" + "}" * 1_900,
        '{"diagnosis":' + "[" * 5_900 + "]" * 5_900 + "}",
        "[" * 11_000,
        '{"diagnosis": [' + '"carcinoma",' * 900 + '"carcinoma"]}',
        '{"diagnoses": [' + ",".join('{"diagnosis": "adenoma"}' for _ in range(400)) + "]}",
        '{"diagnoses": [' + ",".join(f'{{"{i}": 1}}' for i in range(900)) + "]}",
        '{"diagnoses": [{' + ",".join(f'"k{i}": 1' for i in range(900)) + "}]}",
        '{"diagnoses": [{"grade": {"grade": 1}}, [], null, 3]}',
        '{"diagnosis": NaN, "grade": Infinity, "diagnoses": -Infinity}',
        "{" + ",".join(f'"k{i}": {{}}' for i in range(900)) + "}",
        "Diagnoses:\n" + "- x\n" * 490,
        "Diagnoses:\n- x" + "; " * 5_000,
        "Diagnosis\n" * 1_100,
    ],
)
@pytest.mark.parametrize("protocol", ["simulator", "biopsy"])
def test_nested_and_long_answers_earn_nothing_in_little_time(text, protocol):
    gold = GOLD if protocol == "simulator" else "Breast, biopsy;\n  Fibroadenoma"
    earned("", gold, protocol)  # loads the protocol
    times = []
    for i in range(3):
        start = time.process_time()
        assert earned(text + " " * i, gold, protocol) == 0.0
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_a_report_beyond_the_limit_is_not_read():
    assert parse_report(GOLD + " " * (MAX_CHARS - len(GOLD)), SIMULATOR).record == RECORD
    assert parse_report(GOLD + " " * (MAX_CHARS - len(GOLD) + 1), SIMULATOR).record == {}
