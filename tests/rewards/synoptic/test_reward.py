"""The reward as a whole: gold, corruption, order, and hostile input."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.reward import score_report, synoptic

GOLD = [
    "Diagnosis: carcinoma",
    "Grade: 2",
    "Necrosis: present",
    "Quadrant: upper left",
    "Margin: clear",
    "Tumor size: 12 mm",
]
WRONG = ["adenoma", "1", "absent", "lower right", "involved", "40 mm"]
WHOLE = "\n".join(GOLD)
BENIGN = "Diagnosis: normal"


def score(text, gold=WHOLE, protocol="simulator"):
    (value,) = synoptic([f"<answer>{text}</answer>"], answer=[gold], protocol=[protocol])
    return value


@given(st.permutations(GOLD), st.sampled_from([str.upper, str.lower, lambda t: t.replace(": ", "  :   ")]))
def test_order_case_and_white_space_do_not_matter(lines, change):
    assert score(change("\n".join(lines))) == 1.0


def test_empty_answers_earn_nothing():
    for text in ("", " ", "{}", "nothing"):
        assert score(text) == 0.0


@given(st.permutations(range(6)), st.lists(st.sampled_from(range(5)), min_size=6, max_size=6))
def test_corruption_after_corruption_never_raises_the_score(order, kinds):
    lines, last = list(GOLD), 1.0
    for i, kind in zip(order, kinds, strict=True):
        name = lines[i].partition(":")[0]
        lines[i] = ("", f"{name}: {WRONG[i]}", f"{name}: n/a", f"{name}: cannot be determined", f"{name}: zzz")[kind]
        now = score("\n".join(lines))
        assert now < last or now == last == 0
        last = now


def test_a_repeated_field_and_a_field_that_does_not_apply_cost():
    assert score("\n".join([*GOLD, "Grade: 2"])) == 0.0
    assert score(BENIGN, BENIGN) == 1.0
    assert score(BENIGN + "\nGrade: 2", BENIGN) == 0.0


@pytest.mark.parametrize("value", ["grade 1 / grade 2", "2, 3", "2 or 3"])
def test_contradictions_earn_nothing_for_the_field(value):
    assert score("\n".join(GOLD).replace("Grade: 2", f"Grade: {value}")) == pytest.approx(5 / 6)


@pytest.mark.parametrize("size", ["1.2 cm", "1,2 cm", "12", "12.0 mm", "0.9 x 1.2 cm", "about 12 mm", "13.2 mm"])
def test_sizes_convert_and_have_a_tolerance(size):
    assert score("\n".join(GOLD).replace("12 mm", size)) == 1.0


@pytest.mark.parametrize("size", ["13.3 mm", "< 12 mm", "0,125 mm", "12 g", "12 / 13 mm"])
def test_other_sizes_are_wrong(size):
    assert score("\n".join(GOLD).replace("12 mm", size)) == pytest.approx(5 / 6)


@pytest.mark.parametrize("form", ["{}", "{} <answer></answer>", "<answer>{0}</answer><answer>{0}</answer>"])
def test_the_answer_stands_in_one_block(form):
    assert synoptic([form.format("\n".join(GOLD))], answer=["\n".join(GOLD)], protocol=["simulator"]) == [0.0]


@given(st.text(), st.sampled_from(["simulator", "biopsy"]))
def test_any_text_is_scored(text, protocol):
    gold = BENIGN if protocol == "simulator" else "Breast, biopsy;\n  Fibroadenoma"
    assert 0 <= score(text, gold, protocol) <= 1


@pytest.mark.parametrize(
    "part", ["(", "()", ",", " ", "with ", ", with", "1. ", "G1 ", "(a) ", "a\n", '{"a":', "9", "["]
)
@pytest.mark.parametrize("size", [3_900, 11_900, 300_000])
def test_hostile_text_takes_little_time(part, size):
    text = ("Breast, biopsy;\n carcinoma, " + part * size)[:size]
    times = []
    for i in range(3):
        start = time.process_time()
        score(text + str(i), "Breast, biopsy;\n  Fibroadenoma", "biopsy")
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_huge_numbers_are_no_values():
    assert score('{"diagnosis": "carcinoma", "tumour_size_mm": ' + "9" * 4000 + "}") == pytest.approx(1 / 6)


def test_one_report_is_scored_by_itself():
    other = WHOLE.replace("Grade: 2", "Grade: 1")
    found = score_report(other, WHOLE, "simulator")
    assert found.penalised() == score(other) and not found.cells["grade"].right and found.cells["necrosis"].right
    record = {"diagnosis": "carcinoma", "Grade": 2, "necrosis": "present"}
    for text in (WHOLE, f"<think></think><answer>{WHOLE}</answer>"):
        assert score_report(text, record, load_protocol("simulator")).case_score == 1.0


@pytest.mark.parametrize(
    ("gold", "protocol", "message"),
    [(WHOLE, "none", "none"), ("Grade: purple", "simulator", "gold report: .*purple"), ({}, "simulator", "no field")],
)
def test_a_gold_report_that_cannot_be_read_is_an_error(gold, protocol, message):
    with pytest.raises(InputError, match=message):
        score_report(WHOLE, gold, protocol)
