import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.label import choice, normalise
from frugalpath.rewards.registry import warn_unscorable

OPTIONS = ["benign", "malignant", "non-small cell"]
LETTERED = ["(A) benign", "(B) malignant"]
words = st.text("abcdeéß -+1", min_size=1, max_size=12).filter(lambda t: t.strip(" ") != "")


def score(answer, gold, options, **columns):
    (value,) = choice([f"<answer>{answer}</answer>"], answer=[gold], options=[options], **columns)
    return value


@pytest.mark.parametrize(
    "answer",
    ["malignant", "Malignant", " MALIGNANT\n", "malignant.", '"malignant"', "**malignant**", "(malignant)",
     "`malignant`", "(B) malignant", "B) malignant", "b. Malignant.", "B: malignant", "(B)", "B)", "b", "B.",
     "(B)malignant", "**(B)** malignant"],
)  # fmt: skip
def test_names_the_gold_option(answer):
    assert score(answer, "malignant", OPTIONS) == 1.0
    assert score(answer, "malignant", OPTIONS[:2]) == 1.0
    assert score(answer, "(B) malignant", LETTERED) == 1.0
    assert score(answer, "malignant", LETTERED) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["benign", "(A)", "(A) malignant", "(C) malignant", "benign or malignant", "malignant, benign",
     "malignant tissue", "not malignant", "the answer is malignant", "(A) (B)", "A B", "A, B", "AB",
     "(A) benign (B) malignant", "malignan", "malignant malignant", "D", "2", "()", ".", "mali gnant"],
)  # fmt: skip
def test_anything_else_is_wrong(answer):
    assert score(answer, "malignant", OPTIONS) == 0.0
    assert score(answer, "(B) malignant", LETTERED) == 0.0


@pytest.mark.parametrize(
    ("answer", "gold", "options", "expected"),
    [
        ("non–small  cell", "non-small cell", OPTIONS, 1.0),  # en dash
        ("\ufb01brosis", "fibrosis", ["fibrosis", "normal"], 1.0),  # the ligature fi
        ("Cafe\u0301 au lait", "café au lait", ["café au lait", "none"], 1.0),
        ("HER2-", "HER2+", ["HER2+", "HER2-"], 0.0),
        ("her2-", "HER2-", ["HER2+", "HER2-"], 1.0),
        ("HER2", "HER2-", ["HER2+", "HER2-"], 0.0),
        ("ER (+)", "ER (+)", ["ER (+)", "ER (-)"], 1.0),
        ("<5 mm", ">5 mm", ["<5 mm", ">5 mm"], 0.0),
        ("> 5 mm", ">5 mm", ["<5 mm", ">5 mm"], 0.0),
        ("1.5 mm", "1.5 mm", ["1.5 mm", "2.5 mm"], 1.0),
        ("5 mm", "1.5 mm", ["1.5 mm", "2.5 mm"], 0.0),
        ("1", "grade 1", ["grade 0", "grade 1"], 0.0),  # not the first, and not by its text
        ("1", "grade 0", ["grade 0", "grade 1"], 0.0),
        ("1", "1) grade 0", ["1) grade 0", "2) grade 1"], 1.0),
        ("(2) grade 1", "2) grade 1", ["1) grade 0", "2) grade 1"], 1.0),
        ("B", "B", ["B", "A"], 1.0),  # a text goes before a letter
        ("A", "B", ["B", "A"], 0.0),
        ("a. carotis", "A. carotis", ["A. carotis", "A. femoralis"], 1.0),
        ("carotis", "A. carotis", ["A. carotis", "A. femoralis"], 0.0),
        ("carcinoma (NST)", "carcinoma (NST)", ["carcinoma (NST)", "carcinoma (lobular)"], 1.0),
        ("carcinoma", "carcinoma (NST)", ["carcinoma (NST)", "carcinoma (lobular)"], 0.0),
    ],
)
def test_particular_cases(answer, gold, options, expected):
    assert score(answer, gold, options) == expected


def test_rows_of_other_tasks_are_not_scored():
    completions = ["<answer>a</answer>"] * 3
    options = [["a", "b"], None, ["a", "b"]]
    assert choice(completions, answer=["a"] * 3, options=options, task=["choice", "open", "detection"]) == [
        1,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "options", [None, "benign", [], ["benign", "Benign ", "malignant"], ["a", "b"], ["benign", ""], 3]
)
def test_unusable_rows_give_none_and_one_warning(options, caplog):
    warn_unscorable.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert score("benign", "benign", options, task=["choice"], id=["row-7"]) is None
    assert len(caplog.records) == 1
    assert "row-7" in caplog.text


def test_missing_options_column(caplog):
    warn_unscorable.cache_clear()
    assert choice(["<answer>a</answer>"], answer=["a"]) == [None]


@given(st.lists(words, min_size=2, max_size=6, unique_by=lambda t: normalise(t)), st.data())
def test_exactly_the_gold_option_is_right(options, data):
    gold = data.draw(st.sampled_from(options))
    decorate = data.draw(st.sampled_from([str, str.upper, lambda t: f"  {t}\n", lambda t: f'"{t}".']))
    for option in options:
        value = score(decorate(option), gold, options)
        assert value == float(option == gold)
        assert value == score(decorate(option), gold, list(reversed(options)))
