"""Boxes in the 0..1000 frame of prompts and answers, from pixels and from instance masks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from frugalpath.envs.case import FRAME
from frugalpath.slides.images import read_image


def to_frame(boxes: Iterable[Sequence[float]], width: int, height: int) -> list[list[int]]:
    """Pixel boxes `[x1, y1, x2, y2]` of an image (right and lower edge exclusive) as whole numbers in 0..1000.

    A box thinner than one thousandth keeps a width of 1; boxes that reach out of the image are not clipped.
    """
    framed = []
    for x1, y1, x2, y2 in boxes:
        left, right = _interval(x1, x2, width)
        top, bottom = _interval(y1, y2, height)
        framed.append([left, top, right, bottom])
    return framed


def boxes_from_mask(path: str, image_size: tuple[int, int]) -> list[list[int]]:
    """Bounding boxes of the instances of a mask (one positive id each), in reading order of their upper left corners.

    Raises:
        ValueError: the mask differs in size from its image or has several channels.
    """
    from scipy import ndimage  # a third of a second that manifests without masks need not pay

    image = read_image(path, mode=None)
    if image.size != image_size:
        raise ValueError(f"the mask {path} is {image.size} pixels and its image {image_size}; they must agree")
    mask = np.asarray(image)
    if mask.ndim != 2:
        raise ValueError(f"the mask {path} has {mask.shape[2]} channels; write one channel of instance ids")
    ids = mask.astype(np.int64)
    if ids.max() > ids.size:  # scipy keeps a place for every id up to the largest
        names, ids = np.unique(ids, return_inverse=True)
        ids = ids.reshape(mask.shape) + 1 - np.searchsorted(names, 1)
    found = [piece for piece in ndimage.find_objects(ids) if piece is not None]
    boxes = to_frame(((x.start, y.start, x.stop, y.stop) for y, x in found), *image_size)
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def boxes_text(boxes: Iterable[Sequence[int]]) -> str:
    """The gold answer of a detection case."""
    return json.dumps([list(box) for box in boxes])


def _interval(start: float, stop: float, size: int) -> tuple[int, int]:
    low, high = round(start * FRAME / size), round(stop * FRAME / size)
    if high == low and start < stop:
        low, high = (low, high + 1) if high < FRAME else (low - 1, high)
    return low, high
