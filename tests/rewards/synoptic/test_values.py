"""Values of fields: units, numbers, bounds, words for nothing, contradictions and their text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.values import Unreadable, read_value, write_value

SIMULATOR, BIOPSY, BREAST = map(load_protocol, ("simulator", "biopsy", "breast_resection"))
SIZE, NOTES, INSITU = SIMULATOR.by_id["tumour_size_mm"], BIOPSY.by_id["notes"], BIOPSY.by_id["in_situ_component"]
PERCENT, EXTENT = BREAST.by_id["er_percent"], BREAST.by_id["tumor_extent"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("12 mm", 12), ("1.2 cm", 12), ("1,2 cm", 12), ("12000 um", 12), ("12000 µm", 12), ("0.012 m", 12), ("12", 12),
     ("12.50", 12.5), (".5 cm", 5), ("1,200 mm", 1200), ("2.3 x 1.2 x 1 cm", 23), ("0.9 × 1.2 cm", 12),
     ("1.2 cm in greatest dimension", 12), ("about 12 mm", 12), ("~12 mm", 12), ("< 5 mm", "< 5"), ("<5", "< 5"),
     ("less than 0.5 cm", "< 5"), ("≥ 5", ">= 5"), ("at least 5 mm", ">= 5"), ("up to 5 mm", "<= 5"), (12.0, 12)],
)  # fmt: skip
def test_numbers_convert_to_the_unit_of_the_field(text, value):
    assert read_value(SIZE, text) == value


@pytest.mark.parametrize("text", ["12 g", "12 %", "large", "1.2.3", "12 / 13", "1 x 2 x 3 x 4 cm", "9" * 13,
                                  float("nan"), float("inf"), [], {}, "12 mm 13 mm"])  # fmt: skip
def test_what_is_no_size_cannot_be_read(text):
    with pytest.raises(Unreadable):
        read_value(SIZE, text)


def test_a_percentage_is_no_length():
    assert read_value(PERCENT, "95 %") == read_value(PERCENT, "95 percent") == read_value(PERCENT, "95") == 95
    for text in ("95 mm", "10 x 20 %"):
        with pytest.raises(Unreadable):
            read_value(PERCENT, text)


@pytest.mark.parametrize("field", [SIZE, NOTES, SIMULATOR.by_id["grade"]], ids=lambda field: field.id)
def test_words_for_nothing_and_for_undetermined(field):
    for text in (None, "", "-", "n/a", "N/A.", "Not applicable", "null", "none", "not reported"):
        assert read_value(field, text) is None
    for text in ("cannot be determined", "Cannot be assessed", "indeterminate", "unknown"):
        assert read_value(field, text) == "cannot be determined"


def test_booleans():
    assert {read_value(INSITU, v) for v in (True, "yes", "Present", "identified")} == {"present"}
    assert {read_value(INSITU, v) for v in (False, "no", "absent", "none")} == {"not identified"}


@pytest.mark.parametrize(
    "raw", ["not identified, chest wall", ["cannot be determined", "chest wall"], [], "chest wall, x"]
)
def test_several_values_that_contradict_themselves(raw):
    with pytest.raises(Unreadable):
        read_value(EXTENT, raw)


@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_quoted_text_comes_back(text):
    written = write_value(NOTES, text) if text else '""'
    assert read_value(NOTES, written) == text
