from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frugalpath.errors import InputError
from frugalpath.slides.field_store import load_stored
from frugalpath.slides.fields import encode_fields
from frugalpath.slides.patch_encoder import PatchEncoder
from frugalpath.slides.store import write_features

STRIDE = 16


class MeanColour(nn.Module):
    """Mean colour of every STRIDE square; counts the images that it was shown, and together with how many."""

    def __init__(self):
        super().__init__()
        self.sizes: list[tuple[int, int]] = []
        self.passes: list[int] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.passes.append(len(x))
        self.sizes += [tuple(x.shape[2:])] * len(x)
        grid = nn.functional.avg_pool2d(x, STRIDE).permute(0, 2, 3, 1)
        return grid.mean((1, 2)), grid


@pytest.fixture
def backbone() -> MeanColour:
    return MeanColour()


@pytest.fixture
def encoder(backbone) -> PatchEncoder:
    return PatchEncoder(
        "mean", backbone, dim=3, stride=STRIDE, mean=(0, 0, 0), std=(1 / 255,) * 3, fingerprint="mean@1"
    )


@pytest.fixture
def picture(tmp_path):
    """Writes an image of random colours in 16 px squares and gives its path."""

    def write(name: str, height: int = 32, width: int = 48, seed: int = 0) -> str:
        colours = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(colours.repeat(16, 0).repeat(16, 1)).save(path)
        return str(path)

    return write


def test_a_field_becomes_the_cells_of_the_map(picture, encoder, tmp_path):
    path = picture("a.png")
    files = encode_fields([path], tmp_path / "store", encoder, progress=False)
    stored = load_stored(files[path])
    pixels = np.asarray(Image.open(path))[::16, ::16].reshape(-1, 3)
    np.testing.assert_allclose(stored.features, pixels, atol=0.1)
    assert stored.coords.tolist() == [[x, y] for y in (0, 16) for x in (0, 16, 32)]
    expected = {"patch_size": 16, "width": 48, "height": 32, "encoder": "mean", "fingerprint": "mean@1"}
    assert {k: stored.attrs[k] for k in expected} == expected


def test_equal_content_is_encoded_once(picture, encoder, backbone, tmp_path):
    paths = [picture("a.png"), picture("copy.png"), picture("other.png", seed=1)]
    files = encode_fields([*paths, paths[0]], tmp_path / "store", encoder, progress=False)
    assert list(files) == paths
    assert files[paths[0]] == files[paths[1]] != files[paths[2]]
    assert len(backbone.sizes) == 2
    assert len(list((tmp_path / "store").iterdir())) == 1, "one shard"


def test_what_is_stored_is_not_encoded_again(picture, encoder, backbone, tmp_path):
    paths = [picture(f"{i}.png", seed=i) for i in range(3)]
    first = encode_fields(paths[:2], tmp_path / "store", encoder, progress=False)
    assert len(backbone.sizes) == 2
    again = encode_fields(paths, tmp_path / "store", encoder, progress=False)
    assert len(backbone.sizes) == 3, "only the new one"
    assert encode_fields(paths, tmp_path / "store", encoder, progress=False) == again
    assert len(backbone.sizes) == 3
    assert {p: again[p] for p in first} == first


def test_another_encoder_or_size_makes_other_files(picture, encoder, backbone, tmp_path):
    path = picture("a.png")
    files = {encode_fields([path], tmp_path / "store", encoder, side, progress=False)[path] for side in (None, 64)}
    other = PatchEncoder("mean", backbone, dim=3, stride=STRIDE, fingerprint="mean@2")
    files.add(encode_fields([path], tmp_path / "store", other, progress=False)[path])
    assert len(files) == 3 == len(backbone.sizes)


@pytest.mark.parametrize(
    ("size", "side", "shown"),
    [
        ((32, 48), None, (32, 48)),
        ((32, 48), 96, (64, 96)),
        ((32, 48), 50, (32, 48)),  # 50 is not a multiple of 16
        ((64, 16), 32, (32, 16)),  # the short side would be 8: never under one cell
        ((160, 160), 48, (48, 48)),
    ],
)
def test_sides_are_rounded_to_whole_cells(picture, encoder, backbone, tmp_path, size, side, shown):
    path = picture("a.png", *size)
    files = encode_fields([path], tmp_path / "store", encoder, side, progress=False)
    assert backbone.sizes == [shown]
    stored = load_stored(files[path])
    assert (stored.attrs["height"], stored.attrs["width"]) == shown
    assert len(stored) == shown[0] * shown[1] // STRIDE**2


def test_every_broken_image_is_listed_and_the_whole_ones_are_kept(picture, encoder, backbone, tmp_path):
    good, later = picture("good.png"), picture("later.png", seed=1)
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(InputError) as caught:
        encode_fields([good, str(text), str(cut), later], tmp_path / "store", encoder, progress=False)
    assert [p.split(": ")[0] for p in caught.value.problems] == [str(text), str(cut)]
    assert all("replace the file or drop its row" in p for p in caught.value.problems)
    assert len(backbone.sizes) == 2
    encode_fields([good, later], tmp_path / "store", encoder, progress=False)
    assert len(backbone.sizes) == 2, "nothing was lost"


def test_every_missing_image_is_listed(picture, encoder, backbone, tmp_path):
    absent = [str(tmp_path / "absent1.png"), str(tmp_path / "absent2.png")]
    with pytest.raises(InputError) as caught:
        encode_fields([absent[0], picture("a.png"), absent[1]], tmp_path / "store", encoder, progress=False)
    assert [p.split(": ")[0] for p in caught.value.problems] == absent
    assert all("correct the path in the manifest" in p for p in caught.value.problems)
    assert not backbone.sizes


def test_a_grey_or_transparent_image_is_read_as_colour(encoder, tmp_path):
    paths = []
    for mode, colour in (("L", 7), ("RGBA", (7, 7, 7, 255)), ("P", 0)):
        paths.append(str(tmp_path / f"{mode}.png"))
        Image.new(mode, (32, 32), colour).save(paths[-1])
    files = encode_fields(paths, tmp_path / "store", encoder, progress=False)
    assert all(load_stored(files[p]).features.shape == (4, 3) for p in paths)
    np.testing.assert_allclose(load_stored(files[paths[0]]).features, 7, atol=0.01)


def test_fields_of_a_size_share_a_forward_whatever_stands_between_them(picture, encoder, backbone, tmp_path):
    sizes = [(32, 48), (64, 32), (32, 48), (16, 16), (64, 32), (32, 48)]
    paths = [picture(f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    files = encode_fields(paths, tmp_path / "together", encoder, progress=False)
    assert sorted(backbone.passes) == [1, 2, 3]
    for path in paths:
        alone = encode_fields([path], tmp_path / "alone", encoder, progress=False)
        np.testing.assert_array_equal(load_stored(files[path]).features, load_stored(alone[path]).features)
        assert load_stored(files[path]).coords.tolist() == load_stored(alone[path]).coords.tolist()


def test_no_more_pixels_wait_than_fit(picture, encoder, backbone, tmp_path, monkeypatch):
    """Fields that all differ in size would otherwise be held until the last one is read."""
    monkeypatch.setattr("frugalpath.slides.fields.BUFFER_PIXELS", 32 * 48)
    paths = [picture(f"{i}.png", 32, 48 + 16 * i) for i in range(6)]
    encode_fields(paths, tmp_path / "store", encoder, workers=1, progress=False)
    assert sorted(backbone.sizes) == [(32, 48 + 16 * i) for i in range(6)]
    assert len(backbone.passes) == 6


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_fields_out_and_find_them_all(picture, encoder, backbone, tmp_path, world):
    """Also where a process begins when another has already written some of what both found to be missing."""
    paths = [picture(f"{i}.png", seed=i) for i in range(12)]
    for rank in range(world):
        encode_fields(paths, tmp_path / "store", encoder, rank=rank, world=world, progress=False)
    assert len(backbone.sizes) == 12 and len(list((tmp_path / "store").iterdir())) == world
    files = encode_fields(paths, tmp_path / "store", encoder, progress=False)
    assert len(backbone.sizes) == 12
    assert all(len(load_stored(files[p])) == 6 for p in paths)


def test_every_process_names_what_any_of_them_could_not_read(picture, encoder, tmp_path):
    paths = [str(tmp_path / f"text{i}.png") for i in range(6)]
    for i, path in enumerate(paths):
        Path(path).write_text(f"no image {i}")
    own: dict[int, list] = {}

    def encode(rank: int, others: list) -> list[str]:
        def gather(problems: list) -> list:
            own[rank] = problems
            return [*others, *problems]

        with pytest.raises(InputError) as caught:
            encode_fields(paths, tmp_path / "store", encoder, rank=rank, world=2, gather=gather, progress=False)
        return caught.value.problems

    first = encode(0, [])
    assert [p.split(": ")[0] for p in encode(1, own[0])] == paths, "of both, in the order of the cases"
    assert 0 < len(own[0]) == len(first) < 6


def test_files_of_one_field_each_are_read(picture, encoder, backbone, tmp_path):
    """As versions before the store of shards wrote them."""
    path = picture("a.png")
    made = encode_fields([path], tmp_path / "made", encoder, progress=False)[path]
    old = tmp_path / "store" / f"{made.key[:32]}-{made.store.setting}.h5"
    write_features(old, load_stored(made), dtype="float16")
    files = encode_fields([path], tmp_path / "store", encoder, progress=False)
    assert files[path] == str(old) and len(backbone.sizes) == 1
    np.testing.assert_array_equal(load_stored(files[path]).features, load_stored(made).features)


def test_features_that_16_bits_do_not_hold_are_refused(picture, tmp_path):
    class Huge(nn.Module):
        def forward(self, x):
            grid = nn.functional.avg_pool2d(x, STRIDE).permute(0, 2, 3, 1) * 1e6
            return grid.mean((1, 2)), grid

    encoder = PatchEncoder("huge", Huge(), dim=3, stride=STRIDE, fingerprint="huge@1")
    with pytest.raises(InputError, match=r"a.png: the features that huge gives of it do not fit into 16 bits"):
        encode_fields([picture("a.png")], tmp_path / "store", encoder, progress=False)
