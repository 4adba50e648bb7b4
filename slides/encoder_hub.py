"""Encoders from transformers (`AutoModel`) and timm, behind the same `PatchEncoder`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from frugalpath.errors import InputError
from frugalpath.slides.patch_encoder import IMAGENET_MEAN, IMAGENET_STD, PatchEncoder, weights_hash

logger = logging.getLogger(__name__)


def load_transformers(name: str, *, revision: str | None, trust_remote_code: bool, **where: Any) -> PatchEncoder:
    """A transformers vision model: the pooled vector is the CLS token where there is one, else the mean of the map."""
    from transformers import AutoConfig, AutoModel

    keys = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **keys)
        model = AutoModel.from_pretrained(name, **keys)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"encoder {name}: transformers could not load it ({type(error).__name__}: {error}). Give a model id or a "
            "folder that AutoModel takes, `timm:<model>`, or `efficientnet-lite0`, which needs no download"
        ) from error
    mean, std = _normalisation(name, revision)
    vision = getattr(model, "vision_model", model)  # CLIP-like models hold one tower a modality
    backbone = _TransformersMap(vision)
    return _probe(name, backbone, config, model, mean, std, revision, where)


def load_timm(name: str, *, revision: str | None, **where: Any) -> PatchEncoder:
    """A timm model, named `timm:<model>`; `<model>` may be `hf-hub:owner/model`."""
    try:
        import timm
        from timm.data import resolve_model_data_config
    except ImportError as error:
        raise InputError(
            f"encoder {name}: timm cannot be imported ({error}): pip install 'frugalpath[timm]'"
        ) from error
    model_name = name.removeprefix("timm:")
    if revision is not None:
        if not model_name.startswith("hf-hub:"):
            raise InputError(f"encoder {name}: a revision needs the form timm:hf-hub:owner/model")
        model_name = f"{model_name}@{revision}"
    try:
        model = timm.create_model(model_name, pretrained=True, num_classes=0, **_timm_arguments(model_name))
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise InputError(f"encoder {name}: timm could not load it ({type(error).__name__}: {error})") from error
    data = resolve_model_data_config(model)
    return _probe(name, _TimmMap(model), data, model, data["mean"], data["std"], revision, where)


def _timm_arguments(model_name: str) -> dict[str, object]:
    """What the model cards ask for beyond the hub's config."""
    from timm.layers import SwiGLUPacked

    lower = model_name.lower()
    if "virchow" in lower:  # https://huggingface.co/paige-ai/Virchow2
        return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if "uni2-h" in lower:  # https://huggingface.co/MahmoodLab/UNI2-h
        return {
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "mlp_layer": SwiGLUPacked,
            "act_layer": nn.SiLU,
            "reg_tokens": 8,
            "dynamic_img_size": True,
        }
    if lower.endswith("mahmoodlab/uni"):  # https://huggingface.co/MahmoodLab/UNI
        return {"init_values": 1e-5, "dynamic_img_size": True}
    return {"dynamic_img_size": True} if lower.startswith("vit_") else {}


class _TransformersMap(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        import inspect

        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.keys = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model(pixel_values=x, **self.keys).last_hidden_state
        if states.ndim == 4:  # convolutional: (B, C, h, w)
            grid = states.permute(0, 2, 3, 1)
            return grid.mean((1, 2)), grid
        return _split_tokens(states, x.shape[-2], x.shape[-1], self._patch())

    def _patch(self) -> int | None:
        patch = getattr(self.model.config, "patch_size", None)
        return patch if isinstance(patch, int) else None


class _TimmMap(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.model.forward_features(x)
        if states.ndim == 4:
            # Swin-like models hand out channels last, convolutional ones channels first.
            grid = states if states.shape[-1] == self.model.num_features else states.permute(0, 2, 3, 1)
            return grid.mean((1, 2)), grid
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        patch = self.model.patch_embed.patch_size[0]
        tokens = states[:, prefix:]
        grid = tokens.reshape(len(x), x.shape[-2] // patch, x.shape[-1] // patch, -1)
        pooled = self.model.forward_head(states, pre_logits=True)
        if pooled.ndim == 3:  # a model without pooling of its own, such as Virchow
            pooled = states[:, 0] if prefix else tokens.mean(1)
        return pooled, grid


def _split_tokens(
    states: torch.Tensor, height: int, width: int, patch: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, prefix + h * w, d) -> CLS or mean (B, d) and map (B, h, w, d)."""
    count = states.shape[1]
    if patch is not None:
        rows, columns = height // patch, width // patch
    else:  # no patch size in the config (Swin and other hierarchies): a map of the image's proportions
        scale = (height * width / count) ** 0.5
        rows, columns = round(height / scale), round(width / scale)
    prefix = count - rows * columns
    if rows < 1 or columns < 1 or not 0 <= prefix <= 16:
        raise InputError(f"{count} tokens of the encoder do not form a map of a {height} x {width} px image")
    tokens = states[:, prefix:]
    pooled = states[:, 0] if prefix else tokens.mean(1)
    return pooled, tokens.reshape(len(states), rows, columns, -1)


def _normalisation(name: str, revision: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except OSError:
        logger.warning("encoder %s has no preprocessor_config.json: ImageNet mean and deviation are used", name)
        return IMAGENET_MEAN, IMAGENET_STD
    if not found.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return tuple(found.get("image_mean", IMAGENET_MEAN)), tuple(found.get("image_std", IMAGENET_STD))


def _probe(
    name: str,
    backbone: nn.Module,
    config: object,
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    revision: str | None,
    where: Mapping[str, Any],
) -> PatchEncoder:
    """Encode one blank image to learn `dim` and `stride`, which no config states for all families."""
    side = _input_side(config)
    with torch.inference_mode():
        pooled, grid = backbone.eval()(torch.zeros(1, 3, side, side))
    if pooled.shape[-1] != grid.shape[-1] or side % grid.shape[1]:
        raise InputError(
            f"encoder {name}: its pooled vector has {pooled.shape[-1]} values, its map is {tuple(grid.shape[1:])} for "
            f"{side} px: models whose map does not divide the image evenly are not supported"
        )
    settings = repr((name, revision, tuple(mean), tuple(std))).encode()
    return PatchEncoder(
        name,
        backbone,
        dim=pooled.shape[-1],
        stride=side // grid.shape[1],
        mean=mean,
        std=std,
        fingerprint=f"{name}@{weights_hash([settings, *_weight_bytes(model)])}",
        **where,
    )


def _input_side(config: object) -> int:
    if isinstance(config, dict):  # timm's data config
        return config["input_size"][-1]
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    return size if isinstance(size, int) else size[0]


def _weight_bytes(model: nn.Module) -> Iterator[memoryview]:
    for key, value in sorted(model.state_dict().items()):
        yield memoryview(key.encode())
        yield memoryview(value.detach().contiguous().flatten().view(torch.uint8).numpy())
