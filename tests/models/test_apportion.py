"""A budget is divided evenly among what a case shows."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from frugalpath.models.apportion import apportion


@given(st.integers(0, 500), st.integers(1, 9))
def test_a_budget_is_shared_out_whole_and_the_first_get_what_is_left_over(budget, count):
    shares = apportion(budget, [math.inf] * count)
    assert sum(shares) == budget and max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(st.integers(0, 60), st.lists(st.one_of(st.integers(0, 20), st.just(math.inf)), max_size=6))
def test_what_one_cannot_take_goes_to_the_others(budget, room):
    shares = apportion(budget, room)
    assert all(0 <= share <= most for share, most in zip(shares, room, strict=True))
    assert sum(shares) == min(budget, sum(room))
    open_ = [share for share, most in zip(shares, room, strict=True) if share < most]
    assert not open_ or max(shares) - min(open_) <= 1, "nobody gets more than one who could take it"


def test_shares_by_hand():
    assert apportion(14, [math.inf] * 3) == [5, 5, 4]
    assert apportion(14, [math.inf, 2, 3]) == [9, 2, 3]
    assert apportion(14, [1, math.inf, math.inf]) == [1, 7, 6]
    assert apportion(100, [4, 5]) == [4, 5]
    assert apportion(0, [4, 5]) == [0, 0] and apportion(3, []) == []
