"""Values of the published rewards, worked out from their papers and code."""

import pytest

from frugalpath.rewards.cost import birr
from frugalpath.rewards.registry import get_reward

VECTORS = [
    (2142, "128", 1.0, 1.0),
    (2142, "255", 0.8, 0.8),
    (2142, "256", 1.0, 0.5),
    (2142, "4000", 1.0, 0.5),
    (100, "99", 1.0, 1.0),
    (100, "100", 1.0, 0.5),
    (2142, "12 or 300", 1.0, 1.0),  # n = 12
    (2142, "1", 1.0, 0.0),
    (2142, "many", 1.0, 0.0),
]
"""Published vectors of the token reward (methods 1.11): native tokens, answer, score, worth."""


@pytest.mark.parametrize(
    ("native", "answer", "score", "expected"),
    [*VECTORS, (2142, "", 1.0, 0.0), (2142, None, 1.0, 0.0)],
)
def test_token_reward_of_birr4cpath(native, answer, score, expected):
    assert birr(answer, native, score) == expected
    completion = "" if answer is None else f"<think></think><answer>{answer}</answer>"
    # A sweep in which every budget scores the same is the performer that the vectors speak of.
    columns = {"native": [native], "budgets": [[2, 64]], "scores": [[score, score]]}
    assert get_reward("birr_cost")([completion], **columns) == [expected]


@pytest.mark.parametrize(("written", "expected"), [(16_384, 0.0), (18_432, -0.5), (20_480, -1.0), (20_481, -1.0)])
def test_overlong_punishment_of_dapo(written, expected):
    reward = get_reward({"name": "overlong", "params": {"max_length": 20_480, "buffer": 4_096}})
    assert reward(["text"], completion_ids=[[0] * written]) == [expected]
