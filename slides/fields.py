"""Features of fields of view: every image encoded once, kept in the store under its content's name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from slides.encoder import PatchEncoder
from slides.errors import InputError
from slides.images import ImageError, read_image
from slides.store import Features, write_features


def encode_fields(
    paths: Iterable[str], folder: str | Path, encoder: PatchEncoder, side: int | None = None, progress: bool = True
) -> dict[str, str]:
    """Encode images that are not stored yet; returns the feature file of each path.

    A field becomes the cells of the encoder's feature map, one a `stride` square. Equal content is encoded once.

    Args:
        paths: images (anything Pillow reads).
        folder: where feature files are kept; they are named by content, encoder and size.
        side: px of the longer side at which a field is shown to the encoder; None keeps its size. Both sides are
            rounded to multiples of the encoder's stride.

    Raises:
        InputError: all files that cannot be read, each with its reason.
    """
    folder = Path(folder)
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_digest, unique))
    broken = [d for d in digests if d.startswith("error")]
    if broken:
        raise InputError([d.removeprefix("error: ") for d in broken])
    setting = hashlib.sha256(f"{encoder.fingerprint} side={side}".encode()).hexdigest()[:8]
    files = {p: folder / f"{d}-{setting}.h5" for p, d in zip(unique, digests, strict=True)}
    missing = list({f: p for p, f in files.items() if not f.is_file()}.values())
    problems = []
    with ThreadPoolExecutor(1) as reader:
        # One image is decoded while the one before it is encoded.
        pending = reader.submit(_read, missing[0], side, encoder.stride) if missing else None
        for at, path in enumerate(tqdm(missing, desc="encoding fields", disable=not progress or not missing)):
            assert pending is not None
            upcoming = reader.submit(_read, missing[at + 1], side, encoder.stride) if at + 1 < len(missing) else None
            try:
                pixels = pending.result()
            except ImageError as error:
                problems.append(f"{path}: {error}")
            else:
                write_features(files[path], _cells(pixels, encoder), dtype="float16")
            pending = upcoming
    if problems:
        raise InputError(problems)
    return {p: str(f) for p, f in files.items()}


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        return f"error: {path}: {error.strerror}; correct the path in the manifest"


def _read(path: str, side: int | None, stride: int) -> np.ndarray:
    image = read_image(path)
    scale = side / max(image.size) if side else 1.0
    across, down = (max(stride, round(length * scale / stride) * stride) for length in image.size)
    return np.array(image.resize((across, down), Image.Resampling.BICUBIC))


def _cells(pixels: np.ndarray, encoder: PatchEncoder) -> Features:
    grid = encoder.feature_map(pixels[None])[0].cpu().numpy()
    rows, columns, dim = grid.shape
    down, across = np.mgrid[:rows, :columns] * encoder.stride
    return Features(
        grid.reshape(-1, dim),
        np.stack([across.ravel(), down.ravel()], 1),
        {
            "encoder": encoder.name,
            "fingerprint": encoder.fingerprint,
            "patch_size": encoder.stride,
            "width": pixels.shape[1],
            "height": pixels.shape[0],
        },
    )
