"""Plan of one simulated specimen: the drawn truth (diagnosis, size, margin, ...) and the shapes that carry it.

Shapes live on a raster of `Plan.cell` micrometres; the picture is drawn from them at any resolution. Everything that
is reported as truth (size, margin distance, quadrant, necrosis area) is measured on those shapes after they are drawn,
not copied from what was asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
from scipy import ndimage

from frugalpath.envs.boxes import to_frame

DIAGNOSES = ("normal", "adenoma", "carcinoma")
SIZES = ("small", "medium", "large")
MARGINS = ("involved", "close", "clear")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")

FIELD_MM = 0.9  # the field the proportions below are made for; other sizes scale with it
MAX_RASTER = 256  # cells along one side of the raster
CELL_UM = 4.0  # raster cell where the field is small enough
SIZE_CUTS = (0.23, 0.38)  # mm at FIELD_MM: small below the first, large from the second on
CLOSE_MM = 0.12  # mm at FIELD_MM: a clear margin is at least this wide
MITOSES_CUT = 100.0  # per mm2 of tumour: high from here on
# Drawn truth keeps this share of the field away from a cut-off, so that no answer hangs on one raster cell.
GUARD = 0.022
QUADRANT_SHARE = 0.42  # a quadrant is named only where it holds at least this share of the lesion ...
QUADRANT_LEAD = 0.2  # ... and leads the second by this much
AREA = (0.075, 0.105)  # mm2 of lesion at FIELD_MM
# What septa and rims (where no whole gland fits) take from the glands is made good, so that their mean is alike.
RIM = {"small": 1.0, "medium": 1.05, "large": 1.17}
SEPTA = {"small": 0, "medium": 1, "large": 2}  # fibrous septa through the first focus
SEPTUM_UM = 22.0  # their width, at FIELD_MM
TRIES = 60

Focus = tuple[float, float, float, float, float]  # x, y, half axes a >= b, direction of a: micrometres and radians


@dataclass(frozen=True)
class Truth:
    """What is known about a slide. Lengths in mm, areas in mm2; fields that do not apply are None."""

    diagnosis: str
    grade: int | None
    size_mm: float | None  # greatest dimension (Feret) of the largest focus
    area_mm2: float  # all foci
    foci: int
    boxes: list[list[int]]  # of the foci, [x1, y1, x2, y2] in 0..1000 of the slide, in reading order
    margin_mm: float | None  # shortest distance from lesion to inked edge, 0 where it touches
    quadrant: str | None  # quadrant that holds most of the lesion; None where none dominates or there is no lesion
    necrosis: bool
    necrosis_mm2: float
    mitoses: int
    mitoses_per_mm2: float | None

    def as_dict(self) -> dict:
        """Plain values, floats rounded to 0.1 um."""
        return {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Plan:
    """Shapes of one specimen on a raster of (n, n) cells.

    `tissue`, `lesion`, `nests` and `necrosis` are signed depths in micrometres (positive inside, zero on the outline);
    `lesion` never leaves the tissue, `nests` is the lesion without the fibrous septa that divide large foci, and
    `necrosis` never leaves the lesion. `ink` is a weight 0..1 along the parts of the tissue's edge that carry ink.
    """

    size_um: float
    cell: float
    tissue: np.ndarray
    lesion: np.ndarray
    nests: np.ndarray
    necrosis: np.ndarray
    ink: np.ndarray
    truth: Truth

    def at(self, field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Value of a raster field at points in micrometres (nearest cell)."""
        last = len(field) - 1
        column = np.clip((x / self.cell).astype(np.int32), 0, last)
        row = np.clip((y / self.cell).astype(np.int32), 0, last)
        return field[row, column]


def size_cuts(size_mm: float) -> tuple[float, float]:
    """The two cut-offs of the size classes in mm for a field of `size_mm`, rounded to 0.01 mm."""
    low, high = (round(cut * size_mm / FIELD_MM, 2) for cut in SIZE_CUTS)
    return low, high


def close_cut(size_mm: float) -> float:
    """The distance in mm from which a margin is clear, for a field of `size_mm`."""
    return round(CLOSE_MM * size_mm / FIELD_MM, 2)


def make_plan(rng: np.random.Generator, *, size_mm: float, diagnosis: str, grade: int | None) -> Plan:
    """Draw the shapes of one specimen and measure its truth.

    Args:
        rng: every choice that decides an answer comes from it.
        size_mm: side of the square field.
        diagnosis: one of `DIAGNOSES`.
        grade: 1, 2 or 3 for a carcinoma, else None.
    """
    size = size_mm * 1000
    cells = min(MAX_RASTER, round(size / CELL_UM))
    canvas = _Canvas(rng, size, cells)
    wanted = (SIZES[rng.integers(3)], MARGINS[rng.integers(3)])
    lesion = nests = np.full((cells, cells), -size, np.float32)
    if diagnosis != "normal":
        lesion, nests = canvas.lesion(rng, *wanted)
    necrosis = np.full((cells, cells), -size, np.float32)
    if diagnosis == "carcinoma" and rng.random() < 0.5:
        necrosis = canvas.necrosis(rng, lesion)
    high = rng.random() < 0.5
    measured = measure(lesion > 0, canvas.distance_to_ink, canvas.cell)
    area = measured["area_mm2"]
    rate = None
    mitoses = 0
    if diagnosis == "carcinoma":
        viable = area - float((necrosis > 0).sum()) * (canvas.cell / 1000) ** 2
        drawn = rng.uniform(180, 260) if high else rng.uniform(0, 30)
        mitoses = round(drawn * viable)
        rate = mitoses / area
    truth = Truth(
        diagnosis=diagnosis,
        grade=grade,
        **measured,
        necrosis=bool((necrosis > 0).any()),
        necrosis_mm2=float((necrosis > 0).sum()) * (canvas.cell / 1000) ** 2,
        mitoses=mitoses,
        mitoses_per_mm2=rate,
    )
    return Plan(size, canvas.cell, canvas.tissue, lesion, nests, necrosis, canvas.ink, truth)


def measure(mask: np.ndarray, distance_to_ink: np.ndarray, cell: float) -> dict:
    """Size, area, number and boxes of the foci, margin distance and quadrant of a lesion mask.

    Args:
        mask: (n, n) bool.
        distance_to_ink: (n, n) distance to the inked edge in micrometres.
        cell: side of a raster cell in micrometres.
    """
    if not mask.any():
        return {"size_mm": None, "area_mm2": 0.0, "foci": 0, "boxes": [], "margin_mm": None, "quadrant": None}
    labels, foci = ndimage.label(mask, structure=np.ones((3, 3)))
    found = ((x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels))
    n = len(mask) // 2
    share = np.array([mask[:n, :n].sum(), mask[:n, n:].sum(), mask[n:, :n].sum(), mask[n:, n:].sum()]) / mask.sum()
    second, first = np.sort(share)[-2:]
    dominates = first >= QUADRANT_SHARE and first - second >= QUADRANT_LEAD
    return {
        "size_mm": _feret(labels, foci) * cell / 1000,
        "area_mm2": float(mask.sum()) * (cell / 1000) ** 2,
        "foci": int(foci),
        "boxes": sorted(to_frame(found, len(mask), len(mask)), key=lambda box: (box[1], box[0])),
        "margin_mm": float(distance_to_ink[mask].min()) / 1000,
        "quadrant": QUADRANTS[int(share.argmax())] if dominates else None,
    }


def inked_edge(tissue: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """Cells of the tissue's outermost layer that carry ink: the surgical margin as a mask."""
    inside = tissue > 0
    return inside & ~ndimage.binary_erosion(inside, structure=np.ones((3, 3))) & (ink > 0.5)


def _feret(labels: np.ndarray, count: int) -> float:
    """Greatest caliper width, in cells, of any of the labelled parts; 64 directions (at most 0.03 % short)."""
    inner = labels > 0
    rows, columns = np.nonzero(inner & ~ndimage.binary_erosion(inner))
    part = labels[rows, columns]
    order = np.argsort(part, kind="stable")
    starts = np.searchsorted(part[order], np.arange(1, count + 1))
    angles = np.arange(64) * np.pi / 64
    along = np.outer(columns[order], np.cos(angles)) + np.outer(rows[order], np.sin(angles))
    width = np.maximum.reduceat(along, starts) - np.minimum.reduceat(along, starts)
    return float(width.max()) + 1.0


class _Canvas:
    """The tissue and its inked edge, and the placing of a lesion in it. Lengths in micrometres."""

    def __init__(self, rng: np.random.Generator, size: float, cells: int):
        self.size, self.cell = size, size / cells
        self.scale = size / (FIELD_MM * 1000)
        centre = (np.arange(cells, dtype=np.float32) + 0.5) * self.cell
        self.x, self.y = np.broadcast_to(centre, (cells, cells)), np.broadcast_to(centre[:, None], (cells, cells))
        shift = rng.uniform(-0.01, 0.01, 2) * size
        dx, dy = self.x - size / 2 - shift[0], self.y - size / 2 - shift[1]
        self.angle = np.arctan2(dy, dx)
        power = rng.uniform(4, 9)
        across = np.abs(np.cos(self.angle)) ** power + np.abs(np.sin(self.angle)) ** power
        radius = size * rng.uniform(0.445, 0.465) * across ** (-1 / power)
        for k, phase in zip((2, 3, 5, 8), rng.uniform(0, 2 * np.pi, 4), strict=True):
            radius *= 1 + 0.012 * np.cos(k * self.angle + phase)
        # Radial depth overstates the true depth where the outline slants; the gradient's length corrects that.
        depth = radius - np.hypot(dx, dy)
        slope = np.hypot(*np.gradient(depth, self.cell))
        self.tissue = (depth / np.maximum(slope, 0.7)).astype(np.float32)
        # Both lateral edges are inked, as on a resected strip of bowel wall; above and below are no margins.
        self.ink = np.zeros((cells, cells), np.float32)
        for middle in (0, np.pi):
            off = np.abs((self.angle - middle + np.pi) % (2 * np.pi) - np.pi)
            self.ink += np.clip((rng.uniform(0.62, 0.85) - off) * size / 60 + 0.5, 0, 1)
        edge = inked_edge(self.tissue, self.ink)
        self.distance_to_ink = ndimage.distance_transform_edt(~edge).astype(np.float32) * self.cell
        self.coarse = self._coarse(cells // 64 + 1)

    def _coarse(self, step: int) -> SimpleNamespace:
        """Every `step`-th cell: where a focus may be centred. `ink_angle` points away from the nearest ink."""
        pick = np.s_[step // 2 :: step, step // 2 :: step]
        to_ink = self.distance_to_ink[pick]
        rise_y, rise_x = np.gradient(to_ink)
        return SimpleNamespace(
            step=step * self.cell,
            x=self.x[pick],
            y=self.y[pick],
            angle=self.angle[pick],
            tissue=self.tissue[pick],
            to_ink=to_ink,
            ink_angle=np.arctan2(rise_y, rise_x),
        )

    def lesion(self, rng: np.random.Generator, size_class: str, margin: str) -> tuple[np.ndarray, np.ndarray]:
        """Signed depths (lesion, nests) of a lesion of the wanted size class and margin, in a dominating quadrant.

        Total area and total length of outline (septa included) are drawn alike for all classes, so that their mean
        over the slide does not tell the size: a small lesion is several foci, a large one is divided by septa. The
        last try stands where none meets every wish (its truth is measured all the same).
        """
        shape = None
        foci: list[Focus] | None = None
        for _ in range(TRIES):
            quadrant = int(rng.integers(4))
            area = rng.uniform(*AREA) * RIM[size_class] * 1e6 * self.scale**2
            foci = self._place(rng, _axes(rng, size_class, area), quadrant, size_class, margin)
            if foci is None:
                continue
            outline, nests = self._union(rng, foci, SEPTA[size_class])
            shape = np.minimum(outline, self.tissue)
            if (shape > 0).any() and self._meets(shape > 0, size_class, margin):
                break
        if shape is None:
            nests, _ = self._union(rng, [(self.size / 2, self.size / 2, 0.12 * self.size, 0.1 * self.size, 0.0)], 0)
            shape = np.minimum(nests, self.tissue)
        return shape, np.minimum(nests, shape)

    def necrosis(self, rng: np.random.Generator, lesion: np.ndarray) -> np.ndarray:
        """Signed depth of one necrotic area inside the lesion, 0.10 to 0.14 mm across (at 0.9 mm field)."""
        radius = rng.uniform(50, 68) * self.scale
        room = lesion >= min(radius * 1.15, float(lesion.max()) * 0.9)
        pick = rng.choice(np.flatnonzero(room))
        focus = (self.x.flat[pick], self.y.flat[pick], radius * 1.1, radius * 0.9, rng.uniform(0, np.pi))
        return np.minimum(self._union(rng, [focus], 0)[0], lesion - 10 * self.scale)

    def _meets(self, mask: np.ndarray, size_class: str, margin: str) -> bool:
        found = measure(mask, self.distance_to_ink, self.cell)
        guard = GUARD * self.size / 1000
        low, high = size_cuts(self.size / 1000)
        close = close_cut(self.size / 1000)
        size, distance = found["size_mm"], found["margin_mm"]
        fits = {
            "small": size < low - guard,
            "medium": low + guard <= size < high - guard,
            "large": size >= high + guard,
            "involved": distance == 0,
            "close": guard <= distance < close - guard,
            "clear": distance >= close + 2 * guard,
        }
        return fits[size_class] and fits[margin] and found["quadrant"] is not None

    def _place(
        self, rng: np.random.Generator, axes: list[tuple[float, float]], quadrant: int, size_class: str, margin: str
    ) -> list[Focus] | None:
        """Centres for ellipses of the given half axes: (x, y, a, b, angle) each, or None where there is no room."""
        gap = 55 * self.scale
        grid = self.coarse
        at_margin = int(rng.integers(2)) if size_class == "small" else 0
        wide = {"involved": -25.0, "close": rng.uniform(48, 84), "clear": 170.0}[margin] * self.scale
        others = rng.permutation([q for q in range(4) if q != quadrant])
        placed: list[Focus] = []
        for i, (a, b) in enumerate(axes):
            angle = rng.uniform(0, np.pi)
            to_ink = np.hypot(a * np.cos(grid.ink_angle - angle), b * np.sin(grid.ink_angle - angle))
            to_edge = np.hypot(a * np.cos(grid.angle - angle), b * np.sin(grid.angle - angle))
            excess = grid.to_ink - to_ink - wide
            anchor = i == at_margin and margin != "clear"
            if anchor:
                free = np.abs(excess) < grid.step
                free &= grid.tissue > (0.85 if margin == "involved" else 1.0) * to_edge
            else:
                free = (excess > 0 if margin != "involved" else grid.to_ink > to_ink) & (grid.tissue > to_edge)
            main = i == 0 or (size_class == "small" and i == 1)
            inset = 0.04 if size_class == "small" else 0.055 if main else 0.0
            # The second of three foci lies anywhere, a third in another quadrant.
            if main or i == 2 or size_class == "small":
                free &= self._in_quadrant(quadrant if main else others[i % 3], inset)
            for x, y, other, _, _ in placed:
                free &= np.hypot(grid.x - x, grid.y - y) > a + other + gap
            spots = np.flatnonzero(free)
            if not len(spots):
                return None
            pick = rng.choice(spots)
            # An anchor is moved from its grid point onto the exact distance.
            move = excess.flat[pick] if anchor else 0.0
            towards = grid.ink_angle.flat[pick]
            x, y = grid.x.flat[pick] - move * np.cos(towards), grid.y.flat[pick] - move * np.sin(towards)
            placed.append((float(x), float(y), a, b, angle))
        return placed

    def _in_quadrant(self, quadrant: int, inset: float) -> np.ndarray:
        right, below = quadrant % 2, quadrant // 2
        half, inset = self.size / 2, inset * self.size
        across = self.coarse.x > half + inset if right else self.coarse.x < half - inset
        return across & (self.coarse.y > half + inset if below else self.coarse.y < half - inset)

    def _union(self, rng: np.random.Generator, foci: list[Focus], septa: int) -> tuple[np.ndarray, np.ndarray]:
        """Signed depths (near the outline) of a union of ellipses with wavy outlines: whole, and without septa.

        `septa` wavy lines (0 to 2) run through the centre of the first ellipse, the second along its long axis.
        """
        depth = np.full(self.x.shape, -self.size, np.float32)
        nests = depth
        ragged = rng.uniform(0.005, 0.04)
        for i, (x, y, a, b, angle) in enumerate(foci):
            dx, dy = self.x - x, self.y - y
            along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            theta = np.arctan2(across, along)
            wave = np.ones_like(theta)
            for k, turn in zip((3, 7, 11), rng.uniform(0, 2 * np.pi, 3), strict=True):
                wave += np.float32(ragged) * np.cos(k * theta + np.float32(turn))
            focus = ((1 - np.hypot(along / a, across / b) / wave) * np.sqrt(a * b)).astype(np.float32)
            depth = np.maximum(depth, focus)
            for cross, other in ((along, across), (across, along))[: septa if i == 0 else 0]:
                bent = cross + rng.uniform(-0.15, 0.15) * b + 0.1 * b * np.sin(other / (0.3 * a) + rng.uniform(0, 6))
                focus = np.minimum(focus, np.abs(bent) - SEPTUM_UM * self.scale / 2)
            nests = np.maximum(nests, focus)
        return depth, nests.astype(np.float32)


def _axes(rng: np.random.Generator, size_class: str, area: float) -> list[tuple[float, float]]:
    """Half axes (a >= b) of the foci of a size class that share `area`."""
    if size_class == "large":
        shares, stretch = [1.0], (1.5, 2.0)
    elif size_class == "medium":
        shares, stretch = [0.6, 0.2, 0.2], (1.0, 1.25)
    else:
        shares, stretch = [0.25] * 4, (1.0, 1.15)
    aspects = rng.uniform(*stretch, len(shares))
    return [
        (float(np.sqrt(area * share / np.pi * aspect)), float(np.sqrt(area * share / np.pi / aspect)))
        for share, aspect in zip(shares, aspects, strict=True)
    ]
