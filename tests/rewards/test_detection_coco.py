import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from frugalpath.rewards.detection import average_precision, iou_matrix


def boxes(rng, n):
    corner, size = rng.uniform(0, 700, (n, 2)), rng.uniform(50, 300, (n, 2))
    return np.hstack([corner, corner + size])


def shaken(rng, gold):
    """Predictions near some gold boxes, and some that are anywhere."""
    near = gold[rng.random(len(gold)) < 0.8] + rng.normal(0, 25, 4)
    found = np.clip(np.vstack([near, boxes(rng, int(rng.integers(0, 4)))]), 0, 1000)
    return rng.permutation(found[(found[:, 2] > found[:, 0]) & (found[:, 3] > found[:, 1])])


def coco_ap(predicted, gold, threshold):
    """AP by pycocotools of one image, its recall thresholds at the steps that recall can take."""

    def rows(values, **more):
        return [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0,
             "area": (x2 - x1) * (y2 - y1), **({"score": 1 - i / 1000} if more else {})}
            for i, (x1, y1, x2, y2) in enumerate(values.tolist())
        ]  # fmt: skip

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": rows(gold), "info": {}}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(rows(predicted, score=True)), "bbox")
        evaluation.params.iouThrs = np.array([threshold])
        evaluation.params.recThrs = np.arange(1, len(gold) + 1) / len(gold)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][0, :, 0, 0, -1].mean()


@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_average_precision_is_that_of_pycocotools(threshold):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(500):
        gold = boxes(rng, int(rng.integers(1, 6)))
        predicted = shaken(rng, gold)
        if not len(predicted):
            continue
        expected = coco_ap(predicted, gold, threshold)
        assert average_precision(iou_matrix(predicted, gold), threshold) == pytest.approx(expected, abs=1e-9)
        seen.add(round(expected, 3))
    assert len(seen) > 20
