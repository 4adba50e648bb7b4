"""What `slide_models.py` measures: the paths from patch features to a language model, and slides to send through."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import shape
from frugalpath.errors import InputError
from frugalpath.slides.store import Features, read_features, write_features

SIDE = 256
"""Level-0 pixels of a patch at 20x."""
COARSE = 8
"""Sides of a 20x/256 px patch in one of 5x/512 px: a 64th of the patches."""
DIM = 512
"""Width of made-up features, as CONCH's."""
CAP = 4096
"""Patches that PathoSynVLM shows at most (methods 3.3)."""

PATHS: dict[str, dict[str, Any]] = {
    "plain": {"compressors": ["keep"], "aligner": "mlp"},
    "pathosynvlm": {"compressors": ["keep"], "aligner": "mlp", "markers": "unique"},
    "pathosynvlm_all": {"compressors": ["keep"], "aligner": "mlp", "markers": "unique"},
    "pool": {"compressors": ["pool"]},
    "resampler": {"compressors": ["resampler"], "aligner": "linear"},
    "locpath": {
        "compressors": ["stm", "resampler", "importance"], "aligner": "linear", "fusion": "cross_attention",
    },
    "pathalign": {"compressors": ["qformer"], "aligner": "linear"},
}  # fmt: skip
"""Performer options of each path. `plain` puts all patches into the text (as LLaVA does): the control."""
BUDGETS = {
    "pathosynvlm": CAP, "pathosynvlm_all": CAP, "pool": 128, "resampler": 128, "locpath": 96, "pathalign": 32,
}  # fmt: skip
"""Visual tokens asked for; of `plain`, as many as there are patches."""


def made_up(n: int, seed: int = 0) -> Features:
    """A slide of n patches on a grid, with something to merge.

    Regions of about 64 patches, each of one of 16 tissues: a tissue has a mean feature of length 1, and a patch noise
    of a length from 0 to 0.5 around it.
    """
    rng = np.random.default_rng(seed)
    columns = 2 ** math.ceil(math.log2(n) / 2)
    at = np.stack([np.arange(n) % columns, np.arange(n) // columns], 1)
    centres = rng.uniform(0, at.max(0) + 1, size=(n // 64 + 1, 2))
    region = np.concatenate([((part[:, None] - centres) ** 2).sum(-1).argmin(1) for part in np.array_split(at, 64)])
    tissues = rng.normal(size=(16, DIM)) / DIM**0.5
    noise = rng.normal(size=(n, DIM)) / DIM**0.5 * rng.uniform(0, 0.5, size=(n, 1))
    features = tissues[rng.integers(16, size=len(centres))[region]] + noise
    return Features(features, at * SIDE, {"patch_size": SIDE})


def cut(stored: Features, n: int) -> Features:
    """The n patches of a slide nearest to its middle.

    Raises:
        InputError: it has fewer.
    """
    if len(stored) < n:
        raise InputError(f"--features: the slide has {len(stored)} patches, {n} are asked for; give smaller --sizes")
    middle = np.median(stored.coords, axis=0)
    near = np.sort(((stored.coords - middle) ** 2).sum(1).argsort(kind="stable")[:n])
    return Features(stored.features[near], stored.coords[near], {"patch_size": stored.attrs["patch_size"]})


def coarse(stored: Features) -> Features:
    """The same slide in patches of `COARSE` times the side: each has the mean feature of what it covers."""
    side = int(stored.attrs["patch_size"]) * COARSE
    cells, member = np.unique(stored.coords // side, axis=0, return_inverse=True)
    total = np.zeros((len(cells), stored.features.shape[1]))
    np.add.at(total, member.ravel(), stored.features)
    return Features(total / np.bincount(member.ravel())[:, None], cells * side, {"patch_size": side})


def write_slide(folder: Path, path: str, n: int, source: str | None) -> str:
    """Write the slide of n patches at 20x as a path gets it; its file.

    Args:
        source: feature file of a real slide, of which n patches are taken; None for a made-up one.
    """
    stored = cut(read_features(source), n) if source else made_up(n)
    file = folder / f"{path}-{n}.h5"
    write_features(file, coarse(stored) if path == "pathosynvlm" else stored)
    return str(file)


def build(options: argparse.Namespace, path: str, files: dict[str, str]) -> Any:
    """A `SlidePerformer` of a path with random weights, on the device."""
    import torch
    from transformers import AutoConfig

    from frugalpath.models.feature_bank import FeatureBank
    from frugalpath.models.performer import SlidePerformer
    from frugalpath.models.processor import SlideProcessor
    from frugalpath.models.slide_config import SlideVLMConfig
    from frugalpath.models.slide_vlm import SlideVLM
    from frugalpath.models.tokenizer import train_tokenizer

    torch.manual_seed(0)
    made = shape(options)
    tokenizer = train_tokenizer(["Which grade has this tumour?"], 400)
    processor, bank = SlideProcessor(tokenizer), FeatureBank(files)
    text = AutoConfig.for_model(
        "qwen2",
        hidden_size=made["hidden"],
        intermediate_size=made["ffn"],
        num_hidden_layers=made["layers"],
        num_attention_heads=made["heads"],
        num_key_value_heads=made["kv_heads"],
        vocab_size=made["vocab"] or len(tokenizer),
        tie_word_embeddings=made["tied"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = SlideVLMConfig(
        text_config=text, feature_dim=bank.dim, image_token_id=processor.image_token_id, **PATHS[path]
    )
    # Made in its own precision, so that what is loaded is the peak so far.
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(options.device):
        model = SlideVLM(config)
    torch.set_default_dtype(torch.float32)
    return SlidePerformer(model, processor, bank)
