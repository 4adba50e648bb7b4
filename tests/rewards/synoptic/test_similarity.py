"""How alike texts are, and what must not pass for alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.synoptic.similarity import similarity

GOLD = "dense chronic inflammation with focal ulcer of gastric mucosa"
words = st.lists(st.sampled_from([*GOLD.split(), "no", "left", "right", "3", "4", "benign"]), max_size=8).map(" ".join)


@given(words | st.text(max_size=20), words | st.text(max_size=20))
def test_it_is_symmetric_and_from_zero_to_one(a, b):
    assert 0 <= similarity(a, b) <= 1
    assert similarity(a, b) == pytest.approx(similarity(b, a))
    assert similarity(a, a) == 1.0


def test_order_and_case_do_not_matter():
    assert similarity(GOLD, " ".join(GOLD.upper().split()[::-1])) == 1.0


@pytest.mark.parametrize("word", GOLD.split())
def test_one_word_is_not_the_whole(word):
    assert similarity(GOLD, word) < 0.5


def test_every_word_there_is_wins_nothing():
    assert similarity(GOLD, GOLD + " " + " ".join(f"{c}{c}{c}" for c in "abcdefghijklmnopqrstuvwxyz")) < 0.85


@pytest.mark.parametrize(
    ("a", "b"),
    [("no ulcer", "ulcer"), ("left lobe", "right lobe"), ("two foci, 3 mm", "two foci, 4 mm"), ("benign", "malignant"),
     ("carcinoma in situ", "carcinoma"), ("high grade lesion", "low grade lesion"), ("ulcer", "")],
)  # fmt: skip
def test_what_decides_makes_texts_different(a, b):
    assert similarity(a, b) == similarity(b, a) == 0.0
