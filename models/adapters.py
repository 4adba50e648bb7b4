"""Adapters of finished stages: stored next to the merged weights, joined into one, and loaded over their base."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from frugalpath.errors import InputError
from frugalpath.models.language_model import load_language_model, located

ADAPTER = "adapter"
"""Folder of an adapter within that of the stage which trained it, or of a `SlideVLM` that is kept as one."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADDED = "added_tokens.safetensors"
"""File of an adapter with the embeddings of tokens that its base does not have."""


def adapter_of(folder: str | Path) -> Path | None:
    """Path of the adapter in a folder without model weights; None if there is none."""
    found = (place for place in (Path(folder) / ADAPTER, Path(folder)) if (place / CONFIG).is_file())
    return None if any(Path(folder).glob("model*.safetensors")) else next(found, None)


def merge_adapter(model: Any, folder: Path) -> Any:
    """Merge the adapter of a folder into the model."""
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def read_merged(kind: Any, name: str | Path, **options: Any) -> Any:
    """Load a stock model with `from_pretrained`; an adapter is merged into its base.

    Args:
        kind: class of the model. name: of the hub, or a folder of a model or of an adapter.
        options: further arguments of `from_pretrained`.
    """
    adapter = adapter_of(name)
    model = kind.from_pretrained(name if adapter is None else base_name(adapter), **options)
    return model if adapter is None else merge_adapter(model, adapter)


def join_adapters(folders: Sequence[Path], base: str, out: Path) -> None:
    """Join adapters that were trained in sequence, each merged before the next, into one with the sum of their ranks.

    Modules that were trained whole are those of the last.

    Args:
        base: name of the model under the first of them.

    Raises:
        InputError: adapters of another kind than plain LoRA, or of different layers.
    """
    configs = [LoraConfig.from_pretrained(str(folder)) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config.use_dora or config.rank_pattern or config.alpha_pattern or config.bias != "none":
            raise InputError(f"{folder}: only plain LoRA is published as an adapter; publish with --merge")
        if config.target_modules != configs[0].target_modules:
            raise InputError(f"{folder}: adapts other layers than {folders[0]}; publish with --merge")
    joined: dict[str, torch.Tensor] = {}
    for folder, config in zip(folders, configs, strict=True):
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        for name, weight in load_file(folder / WEIGHTS).items():
            if "lora_A" in name:
                joined[name] = torch.cat([joined[name], weight]) if name in joined else weight
            elif "lora_B" in name:
                joined[name] = torch.cat([joined[name], scale * weight], 1) if name in joined else scale * weight
            elif "lora_" in name:
                raise InputError(f"{folder}: {name} does not belong to a linear layer; publish with --merge")
            else:
                joined[name] = weight
    rank = sum(config.r for config in configs)
    plain = replace(configs[-1], r=rank, lora_alpha=rank, use_rslora=False, base_model_name_or_path=base)
    plain.inference_mode = True
    out.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(str(out))
    save_file({name: weight.contiguous() for name, weight in joined.items()}, out / WEIGHTS, {"format": "pt"})


def keep_added(model: Any, base: str, out: Path) -> None:
    """Write the embeddings of the tokens that a language model has more than its base."""
    known = AutoConfig.from_pretrained(**located(base)).get_text_config().vocab_size
    parts = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    added = {name: part.weight[known:].detach().cpu().clone() for name, part in parts.items()}
    if len(added["input"]):
        save_file(added, out / ADDED)


@torch.no_grad()
def grown_base(folder: Path, vocab_size: int) -> Any:
    """The causal language model under an adapter, in float32, grown to `vocab_size` by what `keep_added` wrote."""
    model = load_language_model(base_name(folder))
    if (folder / ADDED).is_file():
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
        added = load_file(folder / ADDED)
        for name, part in (("input", model.get_input_embeddings()), ("output", model.get_output_embeddings())):
            part.weight[-len(added[name]) :] = added[name]
    return model


def config_source(folder: str | Path) -> str:
    """Folder or name of a model's configuration; that of a stock adapter is in its base."""
    adapter = adapter_of(folder)
    return str(folder) if adapter is None or (Path(folder) / "config.json").is_file() else base_name(adapter)


def base_name(folder: Path) -> str:
    """Name of the model that an adapter was trained over."""
    return json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
