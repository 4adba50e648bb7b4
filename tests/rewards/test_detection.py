import itertools
import json
import logging
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.detection import (
    MAX_BOXES,
    ap50,
    ap50_95,
    ap75,
    average_precision,
    iou_matrix,
    parse_boxes,
    valid,
)
from frugalpath.rewards.registry import warn_unscorable

A, B, C = [0, 0, 100, 100], [200, 200, 300, 300], [400, 0, 500, 80]
MISS = [900, 900, 1000, 1000]


def score(boxes, gold, reward=ap50, **columns):
    answer = boxes if isinstance(boxes, str) else json.dumps(boxes)
    (value,) = reward([f"<think></think><answer>{answer}</answer>"], answer=[json.dumps(gold)], **columns)
    return value


def shifted(box, dx):
    return [box[0] + dx, box[1], box[2] + dx, box[3]]


def reference_iou(a, b):
    if not (0 <= a[0] < a[2] <= 1000 and 0 <= a[1] < a[3] <= 1000):
        return Fraction(0)
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return Fraction(width * height, sum(areas) - width * height)


def reference_ap(boxes, gold, threshold):
    """By the definition, in exact arithmetic: the area under the best precision at each recall or more."""
    if not gold:
        return Fraction(not boxes)
    left, hits = list(range(len(gold))), []
    for box in boxes:
        best = max(left, key=lambda j: (reference_iou(box, gold[j]), -j), default=None)
        hits.append(best is not None and reference_iou(box, gold[best]) >= threshold)
        if hits[-1]:
            left.remove(best)
    curve = [(Fraction(sum(hits[:k]), len(gold)), Fraction(sum(hits[:k]), k)) for k in range(1, len(hits) + 1)]
    total = Fraction(0)
    for step in range(1, len(gold) + 1):  # recall moves in steps of 1 / len(gold)
        total += max((p for r, p in curve if r >= Fraction(step, len(gold))), default=Fraction(0)) / len(gold)
    return total


coarse = st.integers(0, 6).map(lambda v: v * 50)  # few values, so that boxes overlap, touch and tie
boxes_any = st.lists(st.tuples(coarse, coarse, coarse, coarse).map(list), max_size=7)
sides = st.sampled_from(list(itertools.combinations(range(0, 350, 50), 2)))
boxes_valid = st.lists(st.tuples(sides, sides).map(lambda xy: [xy[0][0], xy[1][0], xy[0][1], xy[1][1]]), max_size=5)


@given(boxes_any, boxes_valid)
def test_equals_the_definition(boxes, gold):
    assert score(boxes, gold) == pytest.approx(float(reference_ap(boxes, gold, Fraction(1, 2))), abs=1e-12)
    assert score(boxes, gold, ap75) == pytest.approx(float(reference_ap(boxes, gold, Fraction(3, 4))), abs=1e-12)
    steps = [reference_ap(boxes, gold, Fraction(t, 100)) for t in range(50, 100, 5)]
    # 0.55 and its like are no binary fractions: an IoU of exactly 11/20 may fall on either side
    exact = {Fraction(t, 100) for t in range(50, 100, 5)}
    if not exact & {reference_iou(box, g) for box in boxes for g in gold}:
        assert score(boxes, gold, ap50_95) == pytest.approx(float(sum(steps) / 10), abs=1e-12)


@given(boxes_valid, st.data())
def test_gold_in_any_order_scores_one(gold, data):
    shuffled = data.draw(st.permutations(gold))
    for reward in (ap50, ap75, ap50_95):
        assert score(shuffled, gold, reward) == 1.0


@pytest.mark.parametrize(
    ("boxes", "gold", "expected"),
    [
        ([A], [A], 1.0),
        ([A, B], [A, B], 1.0),
        ([A], [A, B], 0.5),
        ([A, MISS], [A], 1.0),  # a false positive after the last true one does not lower the area
        ([MISS, A], [A], 0.5),
        ([MISS, A, B], [A, B], 2 / 3),  # the envelope lifts 1/2 to 2/3
        ([A, MISS, B], [A, B], (1 + 2 / 3) / 2),
        ([A, A], [A, B], 0.5),  # the second has no box left
        ([shifted(A, 50)], [A], 0.0),  # IoU 1/3
        ([[0, 0, 100, 50]], [A], 1.0),  # IoU exactly 1/2
        ([[0, 0, 100, 49]], [A], 0.0),
        ([], [A], 0.0),
        ([], [], 1.0),
        ([A], [], 0.0),
        ([[5, 5, 5, 5]], [], 0.0),  # any box, even one without area
        ([[100, 100, 0, 0], A], [A], 0.5),  # corners swapped: a false positive
        ([[0, 0, 100, 1001], A], [A], 0.5),  # outside the frame
        ([[-1, 0, 100, 100]], [A], 0.0),
        ([[1e300, 0, 1e308, 1e308], A], [A], 0.5),
    ],
)
def test_worked_cases(boxes, gold, expected):
    assert score(boxes, gold) == pytest.approx(expected)


def test_thresholds():
    iou_06 = [0, 0, 100, 60]
    assert (score([iou_06], [A]), score([iou_06], [A], ap75)) == (1.0, 0.0)
    assert score([[0, 0, 100, 62]], [A], ap50_95) == pytest.approx(0.3)  # 0.50, 0.55, 0.60


def test_greedy_takes_the_best_gold_box():
    near = shifted(A, 10)
    assert average_precision(iou_matrix(np.array([near, A], float), np.array([A, near], float)), 0.5) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "benign", "[", "]", "[[]]", "[0,0,1,1]", "[[0,0,1]]", "[[0,0,1,1,1]]", "[[0,0,1,1],]",
     "[[0,0,1,1] [0,0,1,1]]",
     "[[0,0,1,true]]", "[[0,0,1,null]]", "[[0,0,1,\"1\"]]", "[[0,0,1,NaN]]", "[[0,0,1,Infinity]]", "[[0,0,1,1e999]]",
     "[[0,0,1,01]]", "[[0,0,1,.5]]", "[[0,0,1,5.]]", "[[0,0,1,+5]]", "[[0,0,1,0x5]]", "[[0,0,1,1_0]]", "[[0,0,1,١]]",
     "((0,0,1,1))", "[(0,0,1,1)]", '[{"bbox_2d": [0,0,1,1]}]', "[[0,0,1,1]] [[0,0,1,1]]", "boxes: [[0,0,1,1]]",
     "```json\n[[0,0,1,1]]\n```", "[[0,0,1,1]]\u00a0", "[" * 100_000, "[" * 50_000 + "]" * 50_000],
)  # fmt: skip
def test_anything_but_a_list_of_boxes_is_refused(text):
    assert parse_boxes(text) is None
    if "answer" not in text:
        assert score(text, [A]) == 0.0
        assert score(text, []) == 0.0


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[]", []),
        (" [ ]\n", []),
        ("[[0, 0, 1000, 1000]]", [[0, 0, 1000, 1000]]),
        ("[\n [1.5,2e1 , 3E+2,\t-0.5] ,[0,0,1,1]\r\n]", [[1.5, 20, 300, -0.5], [0, 0, 1, 1]]),
    ],
)
def test_reads_json(text, boxes):
    np.testing.assert_array_equal(parse_boxes(text), np.array(boxes, float).reshape(-1, 4))


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=12))
def test_agrees_with_json(value):
    text = json.dumps(value)
    is_box = [isinstance(b, list) and len(b) == 4 and all(type(v) in (int, float) for v in b) for b in value or []
              ] if isinstance(value, list) else [False]  # fmt: skip
    finite = all(is_box) and np.isfinite(np.array(value, float)).all()
    assert (parse_boxes(text) is not None) == finite


def test_only_the_first_boxes_of_a_flood_are_read():
    flood = [[i, 0, i + 1, 1] for i in range(MAX_BOXES)]
    assert score([*flood, A], [A]) == 0.0
    assert score([*flood[1:], A], [A]) == pytest.approx(1 / MAX_BOXES)
    assert score([*flood, A], [A], max_boxes=MAX_BOXES + 1) == pytest.approx(1 / (MAX_BOXES + 1))
    many = [[x, y, x + 10, y + 10] for x, y in itertools.product(range(0, 200, 10), repeat=2)]
    assert score(many, many) == 1.0  # as many as the gold has are always read


@pytest.mark.parametrize(
    "gold", ["", "benign", None, "[[0,0,0,0]]", "[[0,0,1,2000]]", [[5, 5, 1, 1]], [["a"]], float("nan")]
)
def test_unusable_gold_gives_none_and_one_warning(gold, caplog):
    warn_unscorable.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ap50(["<answer>[]</answer>"], answer=[gold], id=["row-3"]) == [None]
    assert len(caplog.records) == 1
    assert "row-3" in caplog.text


def test_gold_as_lists_and_rows_of_other_tasks():
    completions = ["<answer>[[0, 0, 100, 100]]</answer>"] * 3
    assert ap50(completions, answer=[[A], "[]", "benign"], task=["detection", None, "choice"]) == [1.0, 0.0, None]


def test_valid():
    boxes = np.array([A, [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1001, 1], [-1, 0, 1, 1], [0, 0, 1000, 1000]], float)
    assert valid(boxes).tolist() == [True, False, False, False, False, True]
