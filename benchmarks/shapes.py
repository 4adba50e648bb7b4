"""Shapes of the models that `shared_prefix.py` trains, and the FLOPs of a step by formula."""

from __future__ import annotations

import argparse
from typing import Any

from frugalpath.models.cost import DecoderShape, TowerShape

TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16,
         "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
"""Vision tower of Qwen2.5-VL-3B and 7B."""
PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "3b": {
        "hidden": 2048, "layers": 36, "heads": 16, "kv_heads": 2, "ffn": 11008, "vocab": 151936, "tied": True,
        "tower": TOWER,
    },
    "7b": {
        "hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "ffn": 18944, "vocab": 152064, "tied": False,
        "tower": TOWER,
    },
}  # fmt: skip


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Shape of the model: a preset's, or the small one's."""
    width, layers = options.hidden, options.layers
    small = {
        "hidden": width, "layers": layers, "heads": width // 64, "kv_heads": max(1, width // 128), "ffn": 3 * width,
        "vocab": 0, "tied": False, "tower": {"intermediate_size": 3 * width, "fullatt_block_indexes": [layers - 1]},
    }  # fmt: skip
    return {**small, **PRESETS[options.preset]}


def flops(options: argparse.Namespace, shared: bool) -> dict[str, float]:
    """FLOPs of a group's rollouts and update (methods 9.2), by formula; ours has seen the image before."""
    made = shape(options)
    width = made["hidden"] // made["heads"] * made["kv_heads"]
    text = DecoderShape(made["layers"], made["hidden"], width, made["ffn"], made["vocab"] or 400)
    tower = {"hidden_size": made["hidden"], "depth": made["layers"], **made["tower"]}
    sight = TowerShape(
        tower["depth"], len(tower["fullatt_block_indexes"]), tower["hidden_size"], tower["intermediate_size"],
        made["hidden"], 3 * 2 * 14**2, 64, 4,
    )  # fmt: skip
    group, prompt, written = options.group, options.image_tokens + options.text_tokens, options.completion_tokens
    image = sight.read(options.image_tokens)
    pairs = prompt * (prompt + 1) / 2 + written * prompt + written * (written + 1) / 2
    forward = group * ((prompt + written) * text.per_token + 4.0 * text.layers * text.hidden * pairs)
    if shared:
        own = written * prompt + written * (written + 1) / 2
        pairs = prompt * (prompt + 1) / 2 + group * own
        forward = (prompt + group * written) * text.per_token + 4.0 * text.layers * text.hidden * pairs
    forward += group * written * 2.0 * text.hidden * text.vocab
    # A frozen weight has no gradient of its own; checkpointing repeats the forward; a KL term adds the reference's.
    passes = 1 + (1 if options.lora else 2) + bool(options.checkpointing) + bool(options.beta)
    sights = 0 if shared else group * (1 + bool(options.beta))
    decode = group * text.decode(written, prompt)
    generate = text.prefill(prompt) + decode if shared else group * (image + text.prefill(prompt)) + decode
    train = passes * forward + sights * image
    return {"train_step": train, "generate": generate, "step": train + generate}
