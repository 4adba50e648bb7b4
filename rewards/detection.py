"""`ap50`, `ap75`, `ap50_95`: average precision of the boxes that an answer lists.

As in the published code: no confidences, so predictions count in the order they are written; each is matched to the
unmatched gold box of highest IoU and is a true positive if that IoU reaches the threshold; the precision envelope is
made monotone and the area under it summed over all recall steps. Two differences, both because a case without a lesion
is a question like any other here: with no gold box the empty list `[]` scores 1.0 (the published code gives 0) and any
box 0.0. Boxes are in 0..1000 of the image's width and height, so that they do not move with the token budget.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from frugalpath.rewards.answer import Completion, extract_answer
from frugalpath.rewards.registry import column, reward, warn_unscorable

FRAME = 1000.0
MAX_BOXES = 100  # predictions beyond this many are not read, as with COCO's maxDets
MAX_CHARS = 65_536  # an answer longer than this is no list of boxes; 100 boxes take about 3,000

_NUMBER = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+"
_SPACE = r"[ \t\r\n]*+"
_BOX = rf"\[{_SPACE}{_NUMBER}(?:{_SPACE},{_SPACE}{_NUMBER}){{3}}{_SPACE}\]"
# Possessive throughout, so that matching is linear in the text. json is asked only after this has bounded the nesting.
_BOXES = re.compile(rf"{_SPACE}\[{_SPACE}(?:{_BOX}(?:{_SPACE},{_SPACE}{_BOX})*+)?+{_SPACE}\]{_SPACE}")


def parse_boxes(text: str) -> np.ndarray | None:
    """Read `[[x1, y1, x2, y2], ...]`, strictly: JSON, four finite numbers a box, nothing else around.

    Returns:
        Boxes (n, 4), float64, n = 0 for `[]`; None when the text is anything else.
    """
    if not _BOXES.fullmatch(text):
        return None
    try:
        read = json.loads(text, parse_int=float)
    except json.JSONDecodeError:  # before Python 3.11.5 possessive groups match too much (gh-106052)
        return None
    boxes = np.array(read, dtype=np.float64).reshape(-1, 4)
    return boxes if np.isfinite(boxes).all() else None  # 1e999 is valid JSON


def valid(boxes: np.ndarray) -> np.ndarray:
    """Which boxes (n, 4) lie in the frame and have an area, (n,) bool; the others can match nothing."""
    x1, y1, x2, y2 = boxes.T
    return (x1 >= 0) & (y1 >= 0) & (x2 <= FRAME) & (y2 <= FRAME) & (x1 < x2) & (y1 < y2)


def iou_matrix(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs, (n, 4) and (m, 4) -> (n, m); 0 where the first box is not `valid`."""
    good = valid(boxes)
    boxes = np.where(good[:, None], boxes, 0.0)  # no overflow from numbers far outside the frame
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0.0, None).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    other_area = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return shared / (area[:, None] + other_area[None, :] - shared)


def average_precision(iou: np.ndarray, threshold: float) -> float:
    """All-point average precision of predictions in the order of their rows.

    Args:
        iou: IoU of n predictions with m gold boxes, (n, m).
        threshold: a match needs at least this IoU.

    Returns:
        0..1; without gold boxes 1.0 if there are no predictions either, else 0.0.
    """
    n, m = iou.shape
    if m == 0:
        return float(n == 0)
    free = iou.copy()
    hits = np.zeros(n, dtype=bool)
    for i in range(n):
        best = int(free[i].argmax())
        if free[i, best] >= threshold:
            hits[i] = True
            free[:, best] = -1.0
    precision = hits.cumsum() / np.arange(1, n + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / m)  # recall rises by 1/m at each hit, and only there


def _score(
    name: str,
    thresholds: Sequence[float],
    max_boxes: int,
    completions: Sequence[Completion],
    answer: Sequence[Any],
    task: Sequence[str | None] | None,
    id: Sequence[str | None] | None,
) -> list[float | None]:
    n = len(completions)
    values: list[float | None] = []
    for completion, gold_answer, row_task, row_id in zip(
        completions, answer, column(task, n), column(id, n), strict=True
    ):
        if row_task not in (None, "detection"):
            values.append(None)
            continue
        gold_text = gold_answer if isinstance(gold_answer, str) else json.dumps(gold_answer, default=str)
        gold = parse_boxes(gold_text)
        if gold is None or not valid(gold).all():
            problem = "`answer` is not [[x1, y1, x2, y2], ...] in 0..1000 with x1 < x2, y1 < y2"
            warn_unscorable(name, str(row_id), problem)
            values.append(None)
            continue
        text = extract_answer(completion) or ""
        boxes = parse_boxes(text) if len(text) <= max(MAX_CHARS, 4 * len(gold_text)) else None
        if boxes is None:
            values.append(0.0)
            continue
        iou = iou_matrix(boxes[: max(max_boxes, len(gold))], gold)
        values.append(float(np.mean([average_precision(iou, threshold) for threshold in thresholds])))
    return values


@reward("ap50")
def ap50(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    max_boxes: int = MAX_BOXES,
    **columns: Any,
) -> list[float | None]:
    """Average precision at IoU 0.5 of the boxes in the answer.

    Args:
        completions: n completions; the answer is JSON text, `[[x1, y1, x2, y2], ...]`, and nothing else.
        answer: gold boxes, as JSON text or as lists.
        task: rows of another task than `detection` are not scored; without the column all rows are.
        id: names rows in warnings.
        max_boxes: predictions beyond this many (or the number of gold boxes, where there are more) are not read.
        columns: not used.

    Returns:
        n values in 0..1, 0.0 for an answer that is no list of boxes. A box without area or outside 0..1000 is a false
        positive. None for rows of other tasks, and with a warning for rows whose gold boxes are malformed.

    Example:
        >>> ap50(["<answer>[[0, 0, 100, 100]]</answer>"], answer=["[[0, 0, 100, 90]]"])
        [1.0]
    """
    return _score("ap50", (0.5,), max_boxes, completions, answer, task, id)


@reward("ap75")
def ap75(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    max_boxes: int = MAX_BOXES,
    **columns: Any,
) -> list[float | None]:
    """Average precision at IoU 0.75; otherwise as `ap50`."""
    return _score("ap75", (0.75,), max_boxes, completions, answer, task, id)


@reward("ap50_95")
def ap50_95(
    completions: Sequence[Completion],
    answer: Sequence[Any],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    max_boxes: int = MAX_BOXES,
    **columns: Any,
) -> list[float | None]:
    """Mean of the average precisions at IoU 0.50, 0.55, ..., 0.95; otherwise as `ap50`."""
    return _score(
        "ap50_95", [percent / 100 for percent in range(50, 100, 5)], max_boxes, completions, answer, task, id
    )
