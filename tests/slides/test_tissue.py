"""The tissue mask: tissue is found; glass, ink and the dark are not."""

from __future__ import annotations

import numpy as np
import pytest

from frugalpath.slides.scale import SlideError
from frugalpath.slides.tissue import find_tissue, is_dark

MPP = 14.0


def scene(colour=(205, 140, 185), glass=(243, 243, 243), noise=2.0) -> tuple[np.ndarray, np.ndarray]:
    """A thumbnail with a round piece of tissue, and where it is."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:200, :300]
    truth = (x - 150) ** 2 + (y - 100) ** 2 < 50**2
    image = np.where(truth[..., None], colour, glass) + rng.normal(scale=noise, size=(200, 300, 3))
    return image.clip(0, 255).astype(np.uint8), truth


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return (found & truth).sum() / (found | truth).sum()


@pytest.mark.parametrize("colour", [(205, 140, 185), (225, 205, 222), (110, 70, 150), (170, 40, 90), (190, 160, 130)])
def test_stained_tissue(colour):
    image, truth = scene(colour)
    assert overlap(find_tissue(image, MPP), truth) > 0.9


def test_tinted_glass():
    image, truth = scene(glass=(238, 232, 215))
    assert overlap(find_tissue(image, MPP), truth) > 0.9


@pytest.mark.parametrize("glass", [(243, 243, 243), (255, 255, 255), (215, 214, 216), (240, 236, 226)])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_blank_glass(glass, noise):
    image, _ = scene(colour=glass, glass=glass, noise=noise)
    with pytest.raises(SlideError, match="no tissue found"):
        find_tissue(image, MPP)


@pytest.mark.parametrize("ink", [(30, 130, 60), (30, 50, 170), (15, 15, 20)])
@pytest.mark.parametrize("known", [True, None])
def test_marker_ink_is_left_out(ink, known):
    image, truth = scene()
    image[10:30, 20:120] = ink
    found = find_tissue(image, MPP, ink=known)
    assert overlap(found, truth) > 0.9
    assert not found[10:30, 20:120].any()


def test_a_blue_stain_is_no_ink():
    image, truth = scene((60, 75, 160))
    assert overlap(find_tissue(image, MPP), truth) > 0.9
    assert overlap(find_tissue(image, MPP, ink=False), truth) > 0.9


def test_grey_dust_and_black_margins():
    image, truth = scene()
    image[:, :40] = 0
    image[150:156, 200:260] = 160
    assert overlap(find_tissue(image, MPP), truth) > 0.9


def test_fluorescence_is_refused_unless_asked():
    rng = np.random.default_rng(0)
    _, truth = scene()
    image = (rng.normal(scale=2, size=truth.shape)[..., None] + np.where(truth[..., None], (20, 160, 40), 12)).clip(
        0, 255
    )
    image = image.astype(np.uint8)
    assert is_dark(image)
    with pytest.raises(SlideError, match="dark background"):
        find_tissue(image, MPP)
    assert overlap(find_tissue(image, MPP, dark_background=True), truth) > 0.9


def test_specks_are_dropped_and_lumina_filled():
    image, _ = scene()
    image[5:9, 5:9] = (205, 140, 185)
    image[95:105, 145:155] = 243
    found = find_tissue(image, MPP)
    assert not found[:20, :20].any()
    assert found[95:105, 145:155].all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (7, 7)])
def test_tiny_thumbnails(shape):
    image = np.full((*shape, 3), (205, 140, 185), np.uint8)
    if min(shape) > 1:
        assert find_tissue(image, 100.0).any()
    else:
        with pytest.raises(SlideError):
            find_tissue(np.full((*shape, 3), 243, np.uint8), 100.0)
