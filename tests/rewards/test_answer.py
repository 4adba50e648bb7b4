import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.answer import completion_text, extract_answer, form_of
from frugalpath.rewards.format import format_reward

# The published check (BiRR4CPath): starts with <think>, closes it, white space, <answer>..</answer>, nothing follows.
PUBLISHED = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
tagged = st.lists(st.sampled_from([*TAGS, "benign", " ", "\n", "<", "é"]), max_size=9).map("".join)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>round glands</think><answer>benign</answer>", "benign"),
        ("<think></think><answer> benign\n</answer>", "benign"),
        ("<think>a\nb</think>\n\n<answer>two\nlines</answer>", "two\nlines"),
        ("<answer>benign</answer>", "benign"),
        ("reasoning</think><answer>benign</answer>", "benign"),
        ("Surely: <answer>benign</answer> I think.", "benign"),
        ("<think>a<b</think><answer>x < 5 > y</answer>", "x < 5 > y"),
        ("", None),
        ("benign", None),
        ("<answer></answer>", None),
        ("<answer> \n\t</answer>", None),
        ("<answer>benign", None),
        ("benign</answer>", None),
        ("</answer>benign<answer>", None),
        ("<answer>benign</answer><answer>malignant</answer>", None),
        ("<answer>benign<answer>malignant</answer>", None),
        ("<answer>benign</answer></answer>", None),
        ("<think><answer>benign</answer></think>", None),
        ("<think><answer>benign</answer>", None),
        ("<think>a<think>b</think><answer>benign</answer>", None),
        ("</think><think><answer>benign</answer>", None),
        ("<answer><think>a</think>benign</answer>", None),
        ("<ANSWER>benign</ANSWER>", None),
        # an echo of the system prompt before the answer
        ("<think> reasoning process here </think><answer> answer here </answer><answer>benign</answer>", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    assert extract_answer([{"role": "assistant", "content": text}]) == answer


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"content": "a"}], "a"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": [{"type": "image"}, "a"]}], ""),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([], ""),
        (["a"], ""),
        (None, ""),
        (3, ""),
        (b"a", ""),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


@pytest.mark.parametrize(
    ("text", "soft"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think></think> \n <answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer>\n", 0.75),
        (" <think>a</think><answer>b</answer>", 0.5),
        ("<think>a</think> so <answer>b</answer>", 0.75),
        ("<think>a</think> so <answer>b</answer> there", 0.5),
        ("<answer>b</answer>", 0.5),
        ("<think>a</think>b", 0.25),
        ("<think>a</think><answer></answer>", 0.25),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.25),
        ("<think>a<answer>b</answer>", 0.0),
        ("b", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, soft):
    assert format_reward([text, [{"role": "assistant", "content": text}]], soft=True) == [soft, soft]
    assert format_reward([text]) == [float(soft == 1.0)]


@given(tagged)
def test_strict_form_is_the_published_one_with_each_tag_once_and_an_answer(text):
    once = all(text.count(tag) == 1 for tag in TAGS)
    expected = once and PUBLISHED.fullmatch(text) is not None and extract_answer(text) is not None
    assert form_of(text).strict == expected


@given(tagged)
def test_an_answer_is_what_a_single_block_holds(text):
    answer = extract_answer(text)
    if answer is not None:
        assert re.findall("<answer>(.*?)</answer>", text, re.DOTALL)[0].strip() == answer
        assert answer
        assert not any(tag in answer for tag in TAGS)
