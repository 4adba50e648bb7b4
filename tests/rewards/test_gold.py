"""What every reward owes: gold scores 1, nothing 0, layout does not matter, and no text a policy writes breaks it."""

import random
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.answer import END_ANSWER, END_THINK, completion_text, extract_answer
from frugalpath.rewards.registry import get_reward, gold_completion

CHOICE = {"id": "1", "task": "choice", "answer": "Tubular adenoma", "options": ["Tubular adenoma", "Serrated lesion"]}
DETECTION = {"id": "2", "task": "detection", "answer": "[[10, 20, 300, 400], [500, 500, 800.5, 900]]"}
NO_LESION = {"id": "3", "task": "detection", "answer": "[]"}
OPEN = {"id": "4", "task": "open", "answer": "Invasive lobular carcinoma without lymphovascular invasion"}
SYNOPTIC = {"id": "5", "task": "synoptic", "answer": "Diagnosis: carcinoma\nGrade: 2", "protocol": "simulator"}
COST = {**CHOICE, "tokens": 16, "budget": 16, "max_budget": 256}

ROWS = [
    ("choice", CHOICE),
    ("ap50", DETECTION),
    ("ap75", DETECTION),
    ("ap50_95", DETECTION),
    ("ap50", NO_LESION),
    ("ap75", NO_LESION),
    ("ap50_95", NO_LESION),
    ("rouge_l", OPEN),
    ("meteor", OPEN),
    ("synoptic", SYNOPTIC),
    ("synoptic_accuracy", SYNOPTIC),
    ("format", CHOICE),
    ({"name": "format", "params": {"soft": True}}, CHOICE),
    ({"name": "linear_cost", "params": {"score": "choice", "price": 0}}, COST),
]
every = pytest.mark.parametrize(("spec", "row"), ROWS)


def score(spec, row, *completions):
    return get_reward(spec)(list(completions), **{key: [value] * len(completions) for key, value in row.items()})


@every
def test_gold_scores_one(spec, row):
    gold = gold_completion(row)
    assert score(spec, row, gold, [{"role": "assistant", "content": gold}]) == [1.0, 1.0]


@every
def test_nothing_scores_zero(spec, row):
    values = score(spec, row, "", [], [{"role": "assistant", "content": ""}])
    assert all(value <= 0 for value in values)
    assert values == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("spec", [spec for spec, _ in ROWS if "format" not in str(spec)][:4])
def test_an_empty_answer_scores_zero(spec):
    row = CHOICE if spec == "choice" else DETECTION
    assert score(spec, row, "<think></think><answer></answer>", "<think></think><answer> \n</answer>") == [0.0, 0.0]


@every
def test_case_and_white_space_do_not_matter(spec, row):
    for text in (
        row["answer"].upper(),
        row["answer"].lower(),
        f"  {row['answer']}\n",
        row["answer"].replace(" ", "\n "),
    ):
        assert score(spec, row, gold_completion({"answer": text})) == [1.0]


@given(st.randoms(use_true_random=False))
def test_order_of_options_and_gold_boxes_does_not_matter(shuffler):
    options = shuffler.sample(CHOICE["options"], 2)
    completions = [gold_completion(CHOICE), gold_completion({"answer": "Serrated lesion"})]
    assert score("choice", {**CHOICE, "options": options}, *completions) == [1.0, 0.0]
    boxes = [[10, 20, 300, 400], [500, 500, 800, 900], [0, 900, 100, 1000]]
    row = {**DETECTION, "answer": shuffler.sample(boxes, 3)}
    for name in ("ap50", "ap75", "ap50_95"):
        assert score(name, row, gold_completion({"answer": shuffler.sample(boxes, 3)})) == [1.0]


def test_gold_completion():
    assert gold_completion({"answer": "benign"}) == "<think></think><answer>benign</answer>"
    assert gold_completion({"answer": [[0, 0, 1, 1]]}) == "<think></think><answer>[[0, 0, 1, 1]]</answer>"


MB = 1_000_000
PREFIX = "<think></think><answer>"


def closed(text):
    return f"{PREFIX}{text}{END_ANSWER}"


ADVERSARIAL = {
    "nothing": "",
    "1 MB of a": "a" * MB,
    "1 MB answer": closed("a" * MB),
    "1 MB of space in the answer": closed(" " * MB + "benign" + " " * MB),
    "1 MB of inner space": closed("tubular" + " " * MB + "adenoma"),
    "1 MB of <": "<" * MB,
    "answer tags": "<answer>" * (MB // 8),
    "nested": "<answer>" * 50_000 + "</answer>" * 50_000,
    "pairs": "<answer>a</answer>" * 50_000,
    "think tags": "<think></think>" * 50_000 + "<answer>a</answer>",
    "think unclosed": "<think>" + "<thin" * 200_000,
    "brackets": closed("[" * MB),
    "brackets closed": closed("[" * 30_000 + "]" * 30_000),
    "deep JSON objects": closed('{"a":' * 100_000),
    "flood of boxes": closed("[" + ",".join(["[0,0,500,500]"] * 60_000) + "]"),
    "flood of boxes within the limit": closed("[" + ",".join(["[0,0,500,500]"] * 4_600) + "]"),
    "flood of small boxes": closed("[" + ",".join(f"[{i},0,{i + 1},9]" for i in range(900) for _ in range(3)) + "]"),
    "almost boxes": closed("[" + "[0,0,500,500]," * 4_000 + "x]"),
    "NaN": closed("[[NaN, 0, 1, 1]]"),
    "infinity": closed("[[0, 0, 1e999, Infinity]]"),
    "digits": closed("[[0, 0, 1, " + "9" * 50_000 + "]]"),
    "exponent": closed("[[0, 0, 1, 1e" + "9" * 50_000 + "]]"),
    "digits only": closed("9" * MB),
    "ones": closed("1 " * (MB // 2)),
    "space in boxes": closed("[" + " " * 60_000),
    "combining": closed("e" + "\u0301" * MB),
    "expanding": closed("\ufdfa" * MB),
    "surrogate": closed("\ud800"),
    "null": closed("\x00"),
    "right to left": closed("\u202ebenign\u2066"),
    "punctuation": closed("(" * MB),
    "label": closed("(A) " * 100_000),
}


@every
@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_nothing_a_policy_writes_raises_or_is_slow(spec, row, text):
    reward = get_reward(spec)
    columns = {key: [value] for key, value in row.items()}
    seconds = 1.0
    for _ in range(5):  # the best of a few, since the machine may be busy
        started = time.process_time()
        (value,) = reward([text], **columns)
        seconds = min(seconds, time.process_time() - started)
        if seconds < 0.05:
            break
    assert seconds < 0.05
    assert -0.5 <= value <= 1.0


@every
@given(st.text() | st.text("<>/aeginrstwhk[],0123456789. "))
def test_any_text_gets_a_value_and_the_same_again(spec, row, text):
    for completion in (text, closed(text), [{"role": "assistant", "content": text}], [{"content": [{"text": text}]}]):
        first = score(spec, row, completion)
        assert first == score(spec, row, completion)
        assert first[0] is not None and first[0] <= 1.0
    assert (extract_answer(closed(text)) or "") in completion_text(closed(text))


def test_odd_completions_count_as_empty():
    odd = [None, 3, {}, [None], [{"role": "assistant"}], [{"role": "user", "content": gold_completion(CHOICE)}], b"a",
           SimpleNamespace(content="a")]  # fmt: skip
    assert score("choice", CHOICE, *odd) == [0.0] * len(odd)
    assert score("format", CHOICE, *odd) == [0.0] * len(odd)


def test_a_batch_scores_each_row_by_itself():
    rows = [CHOICE, DETECTION, NO_LESION] * 4
    random.Random(0).shuffle(rows)
    columns = {key: [row.get(key) for row in rows] for key in ("id", "task", "answer", "options")}
    completions = [gold_completion(row) for row in rows]
    for name, task in (("choice", "choice"), ("ap50", "detection")):
        assert get_reward(name)(completions, **columns) == [1.0 if row["task"] == task else None for row in rows]
    assert END_THINK in completions[0]
