"""Beer-Lambert stain model: light left after haematoxylin, eosin and marking ink.

I = I0 * exp(-(h * H + e * E + k * K)), with H, E, K unit vectors of absorbance in R, G, B and h, e, k the amounts.
The mean vectors are those of Ruifrok and Johnston (2001) for haematoxylin, and for eosin a mean of theirs and of the
usual bright-field defaults of QuPath.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.14, 0.91, 0.38)
INKS = {  # absorbance, not unit length: some inks are denser than others
    "black": (1.5, 1.5, 1.4),
    "blue": (1.8, 0.9, 0.25),
    "green": (1.5, 0.45, 1.0),
    "red": (0.15, 1.3, 1.1),
    "orange": (0.08, 0.7, 1.6),
}


@dataclass(frozen=True)
class Stain:
    """Stain of one slide.

    `matrix` (3, 3) holds the absorbance of one unit of haematoxylin, eosin and ink in its rows; `strength` scales the
    amounts of haematoxylin and eosin; `white` is the colour of empty glass, 0..255.
    """

    matrix: np.ndarray
    strength: tuple[float, float]
    white: np.ndarray
    ink: str


def draw_stain(rng: np.random.Generator) -> Stain:
    """A stain as one laboratory and scanner would have it: hue, strength, white point and ink vary."""
    rows = [np.asarray(mean) + rng.normal(0, 0.025, 3) for mean in (HAEMATOXYLIN, EOSIN)]
    rows = [np.clip(row, 0.01, None) / np.linalg.norm(np.clip(row, 0.01, None)) for row in rows]
    ink = str(rng.choice(list(INKS)))
    white = rng.uniform(238, 248) + rng.uniform(-4, 4, 3)
    strength = (float(rng.uniform(0.8, 1.25)), float(rng.uniform(0.8, 1.25)))
    return Stain(np.stack([*rows, INKS[ink]]).astype(np.float32), strength, white.astype(np.float32), ink)


def to_rgb(stain: Stain, amounts: tuple[np.ndarray, np.ndarray, np.ndarray], noise: np.ndarray) -> np.ndarray:
    """Colours of stain amounts.

    Args:
        stain: of the slide.
        amounts: haematoxylin, eosin and ink, (H, W) float32 each.
        noise: (H, W) grey levels added to every channel (sensor noise).

    Returns:
        (H, W, 3) uint8.
    """
    h, e, ink = amounts[0] * np.float32(stain.strength[0]), amounts[1] * np.float32(stain.strength[1]), amounts[2]
    rgb = np.empty((*h.shape, 3), np.uint8)
    for channel in range(3):
        weights = stain.matrix[:, channel]
        density = h * weights[0]
        density += e * weights[1]
        density += ink * weights[2]
        np.negative(density, out=density)
        np.exp(density, out=density)
        density *= stain.white[channel]
        density += noise
        rgb[..., channel] = np.clip(density, 0, 255, out=density)
    return rgb
