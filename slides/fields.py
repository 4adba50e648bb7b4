"""Features of fields of view: each image is encoded once and stored by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from frugalpath.errors import InputError
from frugalpath.slides.content import file_digests, usable_cores
from frugalpath.slides.field_store import FieldStore, StoredField
from frugalpath.slides.images import ImageError, read_image
from frugalpath.slides.patch_encoder import PatchEncoder
from frugalpath.slides.stream import read_ahead

BUFFER_PIXELS = 64 * 2**20
"""Maximum pixels of fields that wait for others of their size; above it, the largest group is encoded."""
_REMEDY = "choose another encoder or precision, or drop its row"


def encode_fields(
    paths: Iterable[str],
    folder: str | Path,
    encoder: PatchEncoder,
    side: int | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list], list] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, str | StoredField]:
    """Encode images that are not stored yet; return the location of each path's features.

    A field becomes the cells of the encoder's feature map, one a `stride` square. Equal content is encoded once.
    Fields of one size are encoded together, while others are read.

    Args:
        paths: images (anything Pillow reads).
        folder: where features are kept, by content, encoder and size (`FieldStore`). Files of one field each, as
            earlier versions wrote them (`<digest>-<setting>.h5`), are read.
        side: px of the longer side at which a field is shown to the encoder; None keeps its size. Both sides are
            rounded to multiples of the encoder's stride.
        rank, world: this process encodes one of `world` shares of the images; all get the same result.
        gather: with several processes, the entries of all processes' lists; it also waits for them.
        workers: threads that read ahead; by default one a core that this process may use.
        progress: show a progress bar.

    Raises:
        InputError: all files that cannot be read, each with its reason.
    """
    unique = list(dict.fromkeys(paths))
    digests, broken = file_digests(unique)
    if broken:
        raise InputError([f"{p}: {broken[p]}; correct the path in the manifest" for p in unique if p in broken])
    folder = Path(folder)
    setting = hashlib.sha256(f"{encoder.fingerprint} side={side}".encode()).hexdigest()[:8]
    store = FieldStore(folder, setting, stride=encoder.stride, encoder=encoder.name, fingerprint=encoder.fingerprint)
    single = {p.name: str(p) for p in folder.glob(f"*-{setting}.h5")}
    names = {key: f"{key[:32]}-{setting}.h5" for key in dict.fromkeys(digests[p] for p in unique)}
    path_of = {digests[p]: p for p in reversed(unique)}
    todo = store.missing([key for key, name in names.items() if name not in single])
    # By content, not by place in the list: the other processes may have written some of it by now.
    mine = {key: path_of[key] for key in todo if int(key[:8], 16) % world == rank}
    problems = _encode(mine, store, encoder, side, workers or usable_cores(), progress)
    if gather is not None:
        problems = gather(problems)
    if problems:
        order = {p: i for i, p in enumerate(unique)}
        raise InputError([f"{p}: {why}" for p, why in sorted(problems, key=lambda found: order[found[0]])])
    store.refresh()
    return {p: single.get(names[digests[p]]) or StoredField(store, digests[p]) for p in unique}


def _encode(
    images: dict[str, str], store: FieldStore, encoder: PatchEncoder, side: int | None, workers: int, progress: bool
) -> list[tuple[str, str]]:
    """Encode images by key into the store; return the failed ones with reasons."""
    problems: list[tuple[str, str]] = []
    waiting: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}
    held = 0
    bar = tqdm(total=len(images), desc="encoding fields", unit="field", disable=not progress or not images)

    def encode(size: tuple[int, int]) -> int:
        """Encode all waiting fields of a size; return their number of pixels."""
        group = waiting.pop(size)
        grids = encoder.feature_map(np.stack([pixels for _, pixels in group])).to(torch.float16)
        whole = torch.isfinite(grids).flatten(1).all(1).tolist()
        for (key, _), cells, finite in zip(group, grids.cpu().numpy(), whole, strict=True):
            if finite:
                store.add(key, cells)
            else:
                problems.append(
                    (images[key], f"the features that {encoder.name} gives of it do not fit into 16 bits; {_REMEDY}")
                )
        bar.update(len(group))
        return len(group) * size[0] * size[1]

    read = partial(read_field, side=side, stride=encoder.stride)
    with bar, store:
        for key, pixels in zip(images, read_ahead(read, images.values(), workers), strict=True):
            if isinstance(pixels, str):
                problems.append((images[key], pixels))
                bar.update()
                continue
            size = pixels.shape[:2]
            group = waiting.setdefault(size, [])
            group.append((key, pixels))
            held += size[0] * size[1]
            if len(group) >= encoder.images_per_pass(*size):
                held -= encode(size)
            elif held > BUFFER_PIXELS:
                held -= encode(max(waiting, key=lambda s: len(waiting[s]) * s[0] * s[1]))
        for size in list(waiting):
            encode(size)
    return problems


def read_field(path: str, side: int | None, stride: int) -> np.ndarray | str:
    """Pixels (h, w, 3) of an image as the encoder reads it, or the problem; see `encode_fields`."""
    try:
        image = read_image(path)
    except ImageError as error:
        return str(error)
    scale = side / max(image.size) if side else 1.0
    across, down = (max(stride, round(length * scale / stride) * stride) for length in image.size)
    return np.array(image.resize((across, down), Image.Resampling.BICUBIC))
