"""Tiles a second of patch encoders: batched and one by one, by precision."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts.task import Task
from benchmarks.measure import timed
from frugalpath.slides.encoder import DEFAULT, load_encoder
from frugalpath.slides.patch_encoder import PatchEncoder

IMPORTS = ("transformers.models.dinov2.modeling_dinov2",)
SHAPES = {
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
"""`large` is DINOv2's ViT-L/14, the shape of UNI and of many encoders of pathology."""


def run(task: Task) -> Iterator[dict[str, Any]]:
    """A line for each encoder and precision."""
    torch.set_num_threads(task.cores)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    takes = "precision" in inspect.signature(load_encoder).parameters
    tiles = np.random.default_rng(0).integers(0, 255, (task.settings["tiles"], 224, 224, 3), dtype=np.uint8)
    kind = task.settings["vit"]
    for name, source in ((DEFAULT, DEFAULT), (f"vit-{kind}", str(vit(task, kind)))):
        exact = None
        for precision in ("float32", "bfloat16") if takes else ("float32",):
            more = {"precision": precision} if takes else {}
            encoder = load_encoder(source, device=task.device, **more)
            found, vectors = speed(encoder, tiles, task.device)
            exact = vectors if exact is None else exact
            cosine = torch.nn.functional.cosine_similarity(vectors.float(), exact.float()).min().item()
            yield {"case": f"{name} {precision}", "encoder": name, "precision": precision, **found,
                   "min_cosine_to_float32": round(cosine, 6)}  # fmt: skip
            del encoder


def speed(encoder: PatchEncoder, tiles: np.ndarray, device: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Tiles a second, and the vectors (B, dim)."""
    alone = tiles[: max(4, len(tiles) // 8)]

    def one_by_one() -> None:
        for at in range(len(alone)):
            encoder.encode(alone[at : at + 1])

    vectors = encoder.encode(tiles)  # the first pass chooses kernels
    encoder.encode(alone[:1])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    batched = min(timed(lambda: encoder.encode(tiles), device, 3, 6.0))
    single = min(timed(one_by_one, device, 2, 6.0))
    found: dict[str, Any] = {
        "tiles": len(tiles),
        "tiles_per_second": round(len(tiles) / batched, 1),
        "one_by_one_tiles_per_second": round(len(alone) / single, 1),
        "statistic": "best of 3, and of 2",
    }
    if device == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found, vectors


def vit(task: Task, kind: str) -> Path:
    """Folder of a vision transformer with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    logging.getLogger("frugalpath.slides.encoder_hub").setLevel(logging.ERROR)  # it has no preprocessor_config.json
    folder = task.folder / f"vit-{kind}"
    torch.manual_seed(0)
    with torch.device(task.device):
        model = Dinov2Model(Dinov2Config(image_size=224, patch_size=14, **SHAPES[kind]))
    model.save_pretrained(folder)
    return folder
