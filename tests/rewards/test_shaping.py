import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from frugalpath.errors import InputError
from frugalpath.rewards.registry import RewardError, get_reward
from frugalpath.rewards.shaping import length, overlong, repetition

token_ids = st.lists(st.lists(st.integers(0, 4), max_size=40), min_size=1, max_size=4)


def completion(words):
    """A completion of so many words, an answer among them."""
    return "word " * (words - 1) + "<answer>benign</answer>"


def test_length_falls_from_the_limit_to_its_double():
    values = length([completion(n) for n in (1, 10, 11, 15, 20, 21, 500)], limit=10)
    assert values == pytest.approx([1.0, 1.0, 0.9, 0.5, 0.0, 0.0, 0.0])
    assert length([[{"role": "assistant", "content": completion(15)}]], limit=10) == [0.5]


def test_length_in_tokens():
    ids = [[1] * n for n in (4, 6, 9)]
    reward = get_reward({"name": "length", "params": {"limit": 4, "unit": "tokens"}})
    assert reward([completion(99)] * 3, completion_ids=ids) == [1.0, 0.5, 0.0]


def test_silence_is_not_short():
    silent = ["", "word", "<answer></answer>", "<answer>a</answer><answer>a</answer>"]
    assert length(silent) == [0.0] * 4
    assert length(silent, completion_ids=[[1]] * 4, unit="tokens") == [0.0] * 4


@given(st.text(), st.integers(1, 50))
def test_length_of_any_text(text, limit):
    (value,) = length([f"{text}<answer>a</answer>"], limit=limit)
    assert 0.0 <= value <= 1.0
    assert value <= length([f"{text}<answer>a</answer>"], limit=limit + 1)[0]


@given(token_ids, st.integers(1, 30), st.integers(1, 30))
def test_overlong_is_trls(ids, buffer, rest):
    expected = get_soft_overlong_punishment(buffer + rest, buffer)(ids)
    assert overlong([""] * len(ids), ids, max_length=buffer + rest, buffer=buffer) == expected
    assert all(-1.0 <= value <= 0.0 for value in expected)


@given(token_ids, st.integers(1, 5), st.floats(0, 3))
def test_repetition_is_trls(ids, ngram, penalty):
    expected = get_repetition_penalty_reward(ngram, -penalty)(ids)
    assert repetition([""] * len(ids), ids, ngram=ngram, max_penalty=penalty) == expected
    assert all(-penalty <= value <= 0.0 for value in expected)


def test_repetition_by_hand():
    assert repetition([""] * 4, [[1, 2, 3, 4], [5] * 5, [], [5]], ngram=2) == [0.0, -0.75, 0.0, 0.0]
    assert repetition([""], [[5] * 5], ngram=2, max_penalty=0.2) == pytest.approx([-0.15])


@pytest.mark.parametrize("name", ["overlong", "repetition"])
def test_tokens_are_asked_for(name):
    params = {"max_length": 8, "buffer": 4} if name == "overlong" else {}
    with pytest.raises(RewardError, match="completion_ids"):
        get_reward({"name": name, "params": params})(["a"])


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: length([""], limit=0), "`limit` is 0"),
        (lambda: length([""], unit="lines"), "use words or tokens"),
        (lambda: length([""], unit="tokens"), "no `completion_ids`"),
        (lambda: overlong([""], [[1]], max_length=4, buffer=5), "`buffer` is 5"),
        (lambda: overlong([""], [[1]], max_length=4, buffer=0), "`buffer` is 0"),
        (lambda: repetition([""], [[1]], ngram=0), "`ngram` is 0"),
        (lambda: repetition([""], [[1]], max_penalty=-1.0), "`max_penalty` is -1"),
    ],
)
def test_mistakes_are_named(call, problem):
    with pytest.raises(InputError, match=problem):
        call()


SAME, DIFFERENT = [7] * 1_000_000, list(range(1_000_000))


@pytest.mark.parametrize(
    "call",
    [
        lambda: length(["1 " * 500_000 + "<answer>a</answer>"], limit=10_000),
        lambda: length(["<" * 1_000_000]),
        lambda: overlong([""], [range(1_000_000)], max_length=512, buffer=128),
        lambda: repetition([""], [range(1_000_000)], ngram=4),
        lambda: repetition([""], [SAME], ngram=20),
        lambda: repetition([""], [DIFFERENT], ngram=3),
    ],
)
def test_no_completion_is_slow(call):
    seconds = 1.0
    for _ in range(5):  # the best of a few, and of this process alone, since the machine may be busy
        started = time.process_time()
        call()
        seconds = min(seconds, time.process_time() - started)
    assert seconds < 0.05
