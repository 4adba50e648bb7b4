"""A small random Llama as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(path: Path, tokenizer: Any, hidden: int = 32, layers: int = 2, heads: int = 2) -> dict[str, np.ndarray]:
    """Write it, one weight in blocks of 8 bits; gives its weights by the names that they have in the file."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokenizer))
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens) | {w for w in words if w.startswith("<|")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    kinds = gguf.TokenType
    writer.add_token_types([int(kinds.CONTROL if w in special else kinds.NORMAL) for w in words])
    merges = tokenizer.backend_tokenizer.model
    writer.add_token_merges(_merges(merges))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, hidden**-0.5, shape).astype(np.float32)

    weights = {"token_embd.weight": draw(len(tokenizer), hidden), "output_norm.weight": np.ones(hidden, np.float32)}
    for n in range(layers):
        weights |= {f"blk.{n}.attn_{p}.weight": draw(hidden, hidden) for p in ("q", "k", "v", "output")}
        weights |= {f"blk.{n}.ffn_{p}.weight": draw(2 * hidden, hidden) for p in ("gate", "up")}
        weights[f"blk.{n}.ffn_down.weight"] = draw(hidden, 2 * hidden)
        weights |= {f"blk.{n}.{p}_norm.weight": np.ones(hidden, np.float32) for p in ("attn", "ffn")}
    for name, weight in weights.items():
        if name == "blk.0.ffn_down.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def _merges(model: Any) -> list[str]:
    import json

    return [m if isinstance(m, str) else " ".join(m) for m in json.loads(model.__getstate__())["merges"]]
