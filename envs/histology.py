"""Draws a planned specimen as H&E at any resolution, block by block.

A picture is a pure function of the slide and of the pixel's place: blocks of any size fit together without a seam, so
that a large slide is drawn in bounded memory. Amounts of haematoxylin and eosin are drawn first, colours come from
`frugalpath.envs.stain`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from frugalpath.envs.anatomy import GLANDS, Anatomy, Glands, draw_flow, grow
from frugalpath.envs.specimen import Plan, Truth, make_plan
from frugalpath.envs.stain import Stain, draw_stain, to_rgb

ANGLES = 16  # directions a stamp is stored in, over half a turn
VARIANTS = 12  # shapes of a kind of cell
BLOCK = 1024  # pixels drawn at a time along a strip
PERIOD_UM = 512.0  # after which textures repeat


@dataclass(frozen=True)
class CellStyle:
    """A kind of cell or hole that is stamped: full length and width in micrometres, and its stain."""

    length: tuple[float, float]
    width: tuple[float, float]
    amount: tuple[float, float]  # haematoxylin of a cell; of a hole (haematoxylin, eosin) inside it
    chromatin: float = 0.0  # share of clearing and clumping inside
    hole: bool = False


STAMPS = {
    "goblet": CellStyle((9, 12), (7, 9), (0.10, 0.04), hole=True),
    "vacuole": CellStyle((6, 9), (5, 7), (0.10, 0.05), hole=True),
    "lumen": CellStyle((13, 22), (11, 18), (0.02, 0.03), hole=True),
    "halo": CellStyle((18, 21), (16, 19), (0.10, 0.16), hole=True),
    "basal": CellStyle((6.5, 8.5), (4, 5.5), (1.25, 0), 0.35),
    "pencil": CellStyle((9, 13), (3.4, 4.6), (1.75, 0), 0.2),
    "atypical": CellStyle((8, 12.5), (6, 9), (1.45, 0), 0.6),
    "bizarre": CellStyle((10, 17), (8, 12), (1.7, 0), 0.7),
    "spindle": CellStyle((9, 16), (1.8, 3), (1.0, 0), 0.2),
    "lymphocyte": CellStyle((5.5, 7), (5, 6.5), (2.0, 0), 0.25),
    "apoptosis": CellStyle((3.5, 6), (3.5, 5.5), (2.8, 0)),
    "dust": CellStyle((1.5, 4), (1.2, 3), (1.6, 0)),
    "mitosis": CellStyle((10, 14), (4, 7), (3.4, 0), 0.3),
}


@dataclass(frozen=True)
class Specimen:
    """One slide, ready to be drawn at any resolution."""

    plan: Plan
    anatomy: Anatomy
    stain: Stain
    turn: float  # main direction of the stroma's fibres
    flow: np.ndarray  # (n, n) on the plan's raster: fibres run along its level lines, micrometres
    offset: tuple[float, float]  # of the textures, micrometres

    @property
    def truth(self) -> Truth:
        """What is known about the slide."""
        return self.plan.truth


def make_specimen(seed: tuple[int, ...], *, size_mm: float, diagnosis: str, grade: int | None) -> Specimen:
    """Plan and grow a slide. Truth and appearance come from two independent streams of `seed`."""
    truth_rng, look_rng = (np.random.default_rng([*seed, stream]) for stream in range(2))
    plan = make_plan(truth_rng, size_mm=size_mm, diagnosis=diagnosis, grade=grade)
    stain = draw_stain(look_rng)
    offset = tuple(look_rng.uniform(0, PERIOD_UM, 2))
    turn = float(look_rng.uniform(0, 2 * np.pi))
    flow = draw_flow(look_rng, plan, turn)
    return Specimen(plan, grow(plan, flow, truth_rng, look_rng), stain, turn, flow, offset)


def draw(specimen: Specimen, mpp: float, box: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels of a block.

    Args:
        specimen: the slide.
        mpp: micrometres per pixel.
        box: left, top, width, height in pixels.

    Returns:
        (height, width, 3) uint8.
    """
    pad = _pad(mpp)
    amounts, noise = _amounts(specimen, mpp, (box[0] - pad, box[1] - pad, box[2] + 2 * pad, box[3] + 2 * pad))
    inner = np.s_[pad : pad + box[3], pad : pad + box[2]]
    h, e, ink = (amount[inner] for amount in amounts)
    return to_rgb(specimen.stain, (h, e, ink), noise[inner])


def draw_strip(specimen: Specimen, mpp: float, top: int, rows: int, width: int) -> np.ndarray:
    """Full-width rows of the slide, (rows, width, 3) uint8, drawn in blocks so that memory does not grow with it."""
    starts = range(0, width, BLOCK)
    return np.concatenate(
        [draw(specimen, mpp, (left, top, min(BLOCK, width - left), rows)) for left in starts], axis=1
    )


def draw_amounts(specimen: Specimen, mpp: float, box: tuple[int, int, int, int]) -> np.ndarray:
    """Amounts of haematoxylin, eosin and ink of a block before they are turned into colours, (3, height, width)."""
    pad = _pad(mpp)
    amounts, _ = _amounts(specimen, mpp, (box[0] - pad, box[1] - pad, box[2] + 2 * pad, box[3] + 2 * pad))
    return np.stack(amounts)[:, pad : pad + box[3], pad : pad + box[2]]


def sample(field: np.ndarray, cell: float, mpp: float, box: tuple[int, int, int, int]) -> np.ndarray:
    """Bilinear values of a raster field at a block's pixel centres; (height, width) float32."""
    left, top, width, height = box
    out = field.astype(np.float32, copy=False)
    for axis, start, count in ((1, left, width), (0, top, height)):
        place = np.clip(((np.arange(count) + start + 0.5) * mpp / cell) - 0.5, 0, field.shape[axis] - 1)
        low = np.minimum(place.astype(np.int64), field.shape[axis] - 2)
        part = (place - low).astype(np.float32)
        if axis:
            out = out[:, low] * (1 - part) + out[:, low + 1] * part
        else:
            out = out[low] * (1 - part)[:, None] + out[low + 1] * part[:, None]
    return out


def _amounts(
    specimen: Specimen, mpp: float, box: tuple[int, int, int, int]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    plan, anatomy = specimen.plan, specimen.anatomy
    fibre, blotch, grain, noise = _textures_at(specimen, sample(specimen.flow, plan.cell, mpp, box), mpp, box)
    # Collagen is pink and fibrous with clefts; the lesion's stroma is looser and bluer.
    h = 0.06 + 0.03 * fibre
    e = 0.46 + 0.13 * fibre + 0.05 * blotch
    if plan.truth.foci:
        inside = _ramp(sample(plan.lesion, plan.cell, mpp, box) + 14 * blotch, 16)
        h += 0.10 * inside
        e -= 0.10 * inside
    e *= 1 - 0.75 * np.clip(fibre * 1.1 - 1.15, 0, 1)
    if anatomy.solid:
        sheet = _ramp(sample(plan.nests, plan.cell, mpp, box) + 6 * blotch, 5)
        septum = np.clip(1 - np.abs(blotch) / 0.10, 0, 1) * 0.6
        sheet *= 1 - septum
        h += sheet * (0.38 + 0.06 * grain - h)
        e += sheet * (0.42 + 0.05 * grain - e)
    for kind, glands in anatomy.glands.items():
        _draw_glands(h, e, grain, GLANDS[kind].cytoplasm, glands, mpp, box)
    _draw_lakes(h, e, grain, anatomy.lakes, mpp, box)
    _draw_holes(h, e, anatomy, mpp, box)
    if plan.truth.necrosis:
        dead = _ramp(sample(plan.necrosis, plan.cell, mpp, box) + 6 * blotch, 5)
        h += dead * (0.14 + 0.06 * grain - h)
        e += dead * (0.95 + 0.26 * grain - e)
    for kind, cells in anatomy.cells.items():
        if not STAMPS[kind].hole:
            _stamp(h, kind, cells, mpp, box)
    depth = sample(plan.tissue, plan.cell, mpp, box)
    edge = _ramp(depth + 3 * blotch, 2.0)
    h *= edge
    e *= edge
    off = depth + 5 * blotch + 1.5 * grain
    ink = sample(plan.ink, plan.cell, mpp, box) * np.clip((off + 14) / 5, 0, 1) * np.clip((17 - off) / 8, 0, 1)
    ink *= 0.9 + 0.12 * grain
    return (np.maximum(h, 0), np.maximum(e, 0), np.maximum(ink, 0)), noise


def _ramp(depth: np.ndarray, width: float) -> np.ndarray:
    """Soft mask of a signed depth: 0 outside, 1 inside, over `width` micrometres."""
    return np.clip(depth / np.float32(width) + np.float32(0.5), 0, 1)


def _draw_glands(h, e, grain, cytoplasm, glands: Glands, mpp: float, box) -> None:
    """Paint gland bodies in place: cytoplasm, a pink rim (basement membrane), an empty lumen with some secretion."""
    left, top, width, height = box
    reach = glands.radius * (1 + np.abs(glands.harmonics).sum(1)) + 2 * mpp
    x0 = np.maximum(np.floor((glands.x - reach) / mpp).astype(int) - left, 0)
    x1 = np.minimum(np.ceil((glands.x + reach) / mpp).astype(int) - left, width)
    y0 = np.maximum(np.floor((glands.y - reach) / mpp).astype(int) - top, 0)
    y1 = np.minimum(np.ceil((glands.y + reach) / mpp).astype(int) - top, height)
    column = (np.arange(width, dtype=np.float32) + np.float32(left + 0.5)) * np.float32(mpp)
    row = (np.arange(height, dtype=np.float32) + np.float32(top + 0.5)) * np.float32(mpp)
    for i in np.flatnonzero((x0 < x1) & (y0 < y1)):
        view = np.s_[y0[i] : y1[i], x0[i] : x1[i]]
        dx = column[x0[i] : x1[i]] - np.float32(glands.x[i])
        dy = (row[y0[i] : y1[i]] - np.float32(glands.y[i]))[:, None]
        far = np.sqrt(dx * dx + dy * dy) + np.float32(1e-3)
        c, s = dx / far, dy / far
        c2, s2 = 2 * c * c - 1, 2 * c * s
        a2, b2, a3, b3 = glands.harmonics[i].astype(np.float32)
        wave = 1 + a2 * c2 + b2 * s2 + a3 * c * (2 * c2 - 1) + b3 * s * (2 * c2 + 1)
        radius = np.float32(glands.radius[i])
        depth = radius * wave - far
        lumen = np.clip((radius * wave * np.float32(glands.lumen[i]) - far) / np.float32(2.5) + 0.5, 0, 1)
        body = np.clip(depth / np.float32(1.5) + 0.5, 0, 1)
        rim = np.clip(1 - np.abs(depth) / np.float32(2.0), 0, 1)
        local = grain[view]
        keep = 1 - np.float32(0.93) * lumen
        h[view] += body * ((cytoplasm[0] + 0.05 * local) * keep - h[view])
        e[view] += body * ((cytoplasm[1] + 0.05 * local) * keep + 0.25 * rim - e[view])


def _draw_lakes(h, e, grain, lakes: np.ndarray, mpp: float, box) -> None:
    """Paint pools of red cells in place."""
    left, top, width, height = box
    column = (np.arange(width, dtype=np.float32) + np.float32(left + 0.5)) * np.float32(mpp)
    row = ((np.arange(height, dtype=np.float32) + np.float32(top + 0.5)) * np.float32(mpp))[:, None]
    for x, y, radius in lakes.astype(np.float32):
        columns, rows = np.abs(column - x) < 1.6 * radius, np.abs(row[:, 0] - y) < 1.6 * radius
        if not columns.any() or not rows.any():
            continue
        view = np.ix_(rows, columns)
        far = np.sqrt((column[columns] - x) ** 2 + ((row[rows] - y) * np.float32(1.35)) ** 2)
        local = grain[view]
        pool = np.clip((radius - far + 5 * local) / 4, 0, 1)
        h[view] += pool * (0.05 - h[view])
        e[view] += pool * (0.85 + 0.40 * np.sign(local) * np.minimum(np.abs(local), 1) - e[view])


def _draw_holes(h, e, anatomy: Anatomy, mpp: float, box) -> None:
    """Clear goblet cells, punched lumina and the halos of mitoses in place."""
    holes = {kind: cells for kind, cells in anatomy.cells.items() if STAMPS[kind].hole}
    if "mitosis" in anatomy.cells:
        holes["halo"] = anatomy.cells["mitosis"]
    for kind, cells in holes.items():
        where, stamps, _ = _select(kind, cells, mpp, box)
        if not len(where):
            continue
        flat = where.ravel()
        for plane, amount in zip((h, e), STAMPS[kind].amount, strict=True):
            cover = np.zeros(plane.size, np.float32)
            np.maximum.at(cover, flat, stamps.ravel())
            cover = cover.reshape(plane.shape)
            plane += cover * (np.float32(amount) - plane)


def _stamp(plane: np.ndarray, kind: str, cells, mpp: float, box) -> None:
    """Print cells in place; where they overlap the darker one shows."""
    where, stamps, strength = _select(kind, cells, mpp, box)
    if len(where):
        np.maximum.at(plane.reshape(-1), where.ravel(), (stamps * strength[:, None]).ravel())


def _select(kind: str, cells, mpp: float, box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells whose stamp lies in a block: flat pixel indices (n, k*k), stamp values (n, k*k), strengths (n,)."""
    left, top, width, height = box
    bank = _bank(kind, mpp)
    side = bank.shape[-1]
    half = side // 2
    column = np.floor(cells.xy[:, 0] / mpp).astype(np.int64) - left
    row = np.floor(cells.xy[:, 1] / mpp).astype(np.int64) - top
    keep = (column >= half) & (column < width - half) & (row >= half) & (row < height - half)
    column, row, angle = column[keep], row[keep], cells.angle[keep]
    turn = np.round(angle / np.pi * ANGLES).astype(np.int64) % ANGLES
    # The variant follows from the angle's low digits: the same for a cell whichever block it is drawn in.
    variant = np.floor(np.abs(angle) * 1e4).astype(np.int64) % VARIANTS
    patch = np.arange(side) - half
    offset = (patch[:, None] * width + patch).ravel()
    where = (row * width + column)[:, None] + offset
    return where, bank[variant, turn].reshape(len(row), side * side), cells.strength[keep]


@functools.lru_cache(maxsize=64)
def _bank(kind: str, mpp: float) -> np.ndarray:
    """Stamps of a kind of cell, (VARIANTS, ANGLES, k, k) float32: haematoxylin, or for a hole its cover 0..1."""
    style = STAMPS[kind]
    rng = np.random.default_rng([11, list(STAMPS).index(kind)])
    half = _half(kind, mpp)
    place = np.arange(-half, half + 1) * mpp
    bank = np.zeros((VARIANTS, ANGLES, len(place), len(place)), np.float32)
    for variant in range(VARIANTS):
        a, b = rng.uniform(*style.length) / 2, rng.uniform(*style.width) / 2
        spots, bend, turn3 = rng.uniform(-0.6, 0.6, (5, 2)), rng.uniform(-0.5, 0.5), rng.uniform(0, 2 * np.pi)
        split = kind == "mitosis" and variant % 3 == 0
        for direction in range(ANGLES):
            angle = direction * np.pi / ANGLES
            u = place * np.cos(angle) + place[:, None] * np.sin(angle)
            v = place[:, None] * np.cos(angle) - place * np.sin(angle) + bend * (u / a) ** 2 * b * 0.6
            # Anaphase: two parallel plates instead of one.
            body = np.abs(np.abs(v) - 0.9 * b) * 1.9 if split else v
            theta = np.arctan2(v / b, u / a)
            rho = np.hypot(u / a, body / b) / (1 + 0.08 * np.cos(3 * theta + turn3))
            cover = np.clip((1 - rho) * b / mpp + 0.5, 0, 1)
            if style.hole:
                bank[variant, direction] = cover
                continue
            clump = sum(np.exp(-((u / a - p) ** 2 + (v / b - q) ** 2) / 0.08) for p, q in spots)
            inner = 1 - style.chromatin * np.clip(1.1 - rho, 0, 1) * np.clip(1 - 0.9 * clump, -0.6, 1)
            bank[variant, direction] = style.amount[0] * cover * inner
    return bank


def _half(kind: str, mpp: float) -> int:
    return int(np.ceil(STAMPS[kind].length[1] * 0.62 / mpp)) + 1


def _pad(mpp: float) -> int:
    """Pixels around a block from which a stamp may reach into it."""
    return 2 * max(_half(kind, mpp) for kind in STAMPS)


@functools.lru_cache(maxsize=2)
def _textures(mpp: float) -> np.ndarray:
    """Seamless textures of unit variance, (4, n, n) float32: fibres along x, blotches, grain, white noise."""
    n = round(PERIOD_UM / mpp)
    rng = np.random.default_rng(7)
    fx, fy = np.fft.rfftfreq(n, mpp)[None], np.fft.fftfreq(n, mpp)[:, None]
    filters = [
        np.exp(-((fx * 70) ** 2) - (fy * 8) ** 2) * (1 - np.exp(-((fy * 50) ** 2))),
        np.exp(-(fx**2 + fy**2) * 70.0**2),
        np.exp(-(fx**2 + fy**2) * 7.0**2),
    ]
    bank = np.empty((4, n, n), np.float32)
    for i, weight in enumerate(filters):
        values = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * weight, s=(n, n))
        bank[i] = (values - values.mean()) / values.std()
    bank[3] = rng.standard_normal((n, n))
    return bank


def _textures_at(specimen: Specimen, flow: np.ndarray, mpp: float, box) -> tuple[np.ndarray, ...]:
    """Fibres (which follow the flow), blotches, grain and noise of a block, (height, width) each."""
    left, top, width, height = box
    bank = _textures(mpp)
    n = bank.shape[-1]
    column = (np.arange(left, left + width) + int(specimen.offset[0] / mpp)) % n
    row = (np.arange(top, top + height) + int(specimen.offset[1] / mpp)) % n
    blotch, grain, noise = (texture.take(row, 0).take(column, 1) for texture in bank[1:])
    # The fibres' texture is read across them at the flow, and along them at the plain coordinate of their direction.
    x, y = np.arange(left, left + width), np.arange(top, top + height)
    along = (x * np.cos(specimen.turn)).astype(np.float32) + (y * np.sin(specimen.turn)).astype(np.float32)[:, None]
    index = np.floor(flow * np.float32(1 / mpp)).astype(np.int32) % n
    index *= n
    index += np.floor(along).astype(np.int32) % n
    return bank[0].take(index), blotch, grain, noise * np.float32(2.0)
