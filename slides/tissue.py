"""Find the tissue of a slide in a thumbnail.

Glass is colourless and tissue is stained: Otsu's threshold on colour strength, kept within limits so that the noise of
blank glass does not become tissue, then hysteresis (pale areas that touch strongly stained ones belong to them) and
morphology. Marker ink and the black outside of the scan are left out.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from skimage.morphology import isotropic_closing, isotropic_opening, remove_small_holes, remove_small_objects

from frugalpath.slides.scale import SlideError

# Colour strength: max - min of R, G, B over 255, after glass is made neutral. On the slides seen, glass stays below
# 0.02, pale stroma, fat and weakly stained immunohistochemistry lie above 0.03, H&E mostly above 0.08.
WEAKEST, FLOOR, CEILING = 0.025, 0.045, 0.12
SMOOTH_UM = 12.0
CLOSE_UM = 40.0
SMALLEST_UM2 = 10_000.0
HOLE_UM2 = 60_000.0


def find_tissue(
    thumbnail: np.ndarray, mpp: float, *, ink: bool | None = None, dark_background: bool = False
) -> np.ndarray:
    """Compute the tissue mask of a thumbnail.

    Args:
        thumbnail: uint8 (h, w, 3).
        mpp: microns per pixel of the thumbnail.
        ink: whether what has the colour of marker ink is ink (True, for H&E) or may be stain (False, for others);
            None tells by the amount: when most of what is coloured has it, then it is the stain.
        dark_background: read fluorescence too: on a dark background, tissue is what is bright.

    Returns:
        bool (h, w).

    Raises:
        SlideError: no tissue, or a dark background without the option for it.
    """
    if not is_dark(thumbnail):
        mask = _stained(thumbnail, mpp, ink)
    elif dark_background:
        mask = _bright(thumbnail, mpp)
    else:
        raise SlideError(
            "dark background: fluorescence is not read as brightfield; use --dark-background to treat bright areas as "
            "tissue"
        )
    mask = _tidy(mask, mpp)
    if not mask.any():
        raise SlideError("no tissue found: blank or almost blank glass")
    return mask


def is_dark(thumbnail: np.ndarray) -> bool:
    """Whether the background is dark: mostly dark pixels and practically no glass."""
    brightest, darkest = _extremes(thumbnail)
    return bool((brightest < 64).mean() > 0.5 and (darkest > 170).mean() < 0.02)


def _stained(thumbnail: np.ndarray, mpp: float, ink: bool | None) -> np.ndarray:
    pixels = thumbnail.astype(np.float32)
    black = _black(pixels)
    neutral = np.clip(pixels * (255 / _glass(pixels, black)), 0, 255)
    brightest, darkest = _extremes(neutral)
    strength = ndimage.gaussian_filter((brightest - darkest) / 255, min(SMOOTH_UM / mpp, 3.0))
    ignored = black
    if ink is not False:
        inked = _ink(pixels)
        coloured = strength > FLOOR
        if ink or (inked & coloured).sum() < 0.5 * coloured.sum():
            ignored = black | inked
    seen = strength[~ignored]
    if seen.size == 0 or seen.max() <= FLOOR:
        return np.zeros(ignored.shape, bool)
    high = float(np.clip(threshold_otsu(np.minimum(seen, 0.3)), FLOOR, CEILING))
    low = max(WEAKEST, 0.35 * high)
    return apply_hysteresis_threshold(np.where(ignored, 0, strength), low, high)


def _glass(pixels: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """RGB of the empty glass, so that a tint of the scanner does not look like stain; white where no glass is seen."""
    brightest, darkest = _extremes(pixels)
    candidates = pixels[~ignored & (darkest > 190) & (brightest - darkest < 30)]
    if len(candidates) < 0.005 * ignored.size:
        return np.full(3, 255, np.float32)
    return np.median(candidates[:: math.ceil(len(candidates) / 50_000)], axis=0)


def _ink(pixels: np.ndarray) -> np.ndarray:
    """Marker ink: green, or blue and red of a purity that stains do not reach."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    greenish = (green > red + 20) & (green > blue - 25) & (red < 190)
    bluish = (blue > 1.35 * red + 25) & (blue > green + 25) & (red < 110)
    reddish = (red > 150) & (red > 2.1 * green) & (red > 2.1 * blue)
    ink = greenish | bluish | reddish
    # The rim of a stroke is pale: widen it. Single pixels are not a stroke.
    return ndimage.binary_dilation(ndimage.binary_opening(ink, iterations=1), iterations=2)


def _black(pixels: np.ndarray) -> np.ndarray:
    """Black ink, and what lies outside of the scanned area."""
    brightest, darkest = _extremes(pixels)
    black = (brightest < 60) & (brightest - darkest < 25)
    return ndimage.binary_dilation(ndimage.binary_opening(black, iterations=1), iterations=2)


def _extremes(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest and the smallest of R, G and B; 20 times faster than max and min over the last axis."""
    red, green, blue = np.moveaxis(pixels, 2, 0)
    return np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)


def _bright(thumbnail: np.ndarray, mpp: float) -> np.ndarray:
    light = ndimage.gaussian_filter(_extremes(thumbnail)[0].astype(np.float32), min(SMOOTH_UM / mpp, 3.0))
    if light.max() - light.min() < 8:
        return np.zeros(light.shape, bool)
    return light > threshold_otsu(light)


def _tidy(mask: np.ndarray, mpp: float) -> np.ndarray:
    """Join what is close, drop specks, fill lumina; all by physical size."""
    if min(mask.shape) > 8:
        mask = isotropic_opening(mask, 1)
    if not mask.any():
        return mask  # distances to nothing are not defined
    radius = math.ceil(CLOSE_UM / mpp)
    padded = np.pad(mask, radius + 1)
    mask = isotropic_closing(padded, radius)[radius + 1 : -radius - 1, radius + 1 : -radius - 1]
    mask = remove_small_objects(mask, max_size=math.ceil(SMALLEST_UM2 / mpp**2))
    return remove_small_holes(mask, max_size=math.ceil(HOLE_UM2 / mpp**2))
