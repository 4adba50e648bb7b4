"""What grows on a planned specimen: glands, cells, mitoses, and the harmless structures that vary from slide to slide.

Real sizes in micrometres, whatever the field: crypts of about 80, nuclei of 6 to 14.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from frugalpath.envs.specimen import Plan

APOPTOSES = 300.0  # per mm2 of lesion at most
KNOT_UM = 150.0  # distance over which the direction of stromal fibres changes


@dataclass(frozen=True)
class GlandStyle:
    """How glands of one kind look; lengths in micrometres, `lumen` and `rows` in units of the radius."""

    pitch: float  # distance of neighbours
    radius: tuple[float, float]
    stretch: float  # largest second harmonic: 0 round, 0.35 tubular
    wobble: float  # largest third harmonic: angular outline
    lumen: tuple[float, float]
    rows: tuple[float, ...]  # where the rows of nuclei lie
    spacing: float  # along a row
    nucleus: str
    cytoplasm: tuple[float, float]  # haematoxylin, eosin
    goblets: float = 0.0  # goblet cells per 10 um of circumference
    lumina: int = 0  # further lumina punched into the epithelium (cribriform)
    fill: float = 0.0  # pitch of nuclei that fill the whole gland, 0 for none


GLANDS = {
    "crypt": GlandStyle(104, (33, 43), 0.12, 0.03, (0.22, 0.34), (0.89,), 6.5, "basal", (0.13, 0.26), goblets=0.9),
    "adenoma": GlandStyle(
        74, (30, 38), 0.30, 0.03, (0.14, 0.26), (0.90, 0.74, 0.60), 5.0, "pencil", (0.26, 0.26), goblets=0.06
    ),
    "well": GlandStyle(82, (28, 40), 0.22, 0.10, (0.50, 0.62), (0.86, 0.74), 6.5, "atypical", (0.22, 0.36)),
    "moderate": GlandStyle(
        92, (42, 54), 0.16, 0.10, (0.0, 0.0), (0.93,), 7.0, "atypical", (0.28, 0.40), lumina=6, fill=8.8
    ),
}
GRADE_GLANDS: dict[int | None, str] = {1: "well", 2: "moderate"}  # grade 3 grows in sheets


@dataclass
class Glands:
    """Gland outlines r(t) = radius * (1 + a2 cos 2t + b2 sin 2t + a3 cos 3t + b3 sin 3t); arrays of one length."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    harmonics: np.ndarray  # (n, 4)
    lumen: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def outline(self, index: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Radius of the glands `index` in direction `t`."""
        a2, b2, a3, b3 = self.harmonics[index].T
        wave = a2 * np.cos(2 * t) + b2 * np.sin(2 * t) + a3 * np.cos(3 * t) + b3 * np.sin(3 * t)
        return self.radius[index] * (1 + wave)


@dataclass
class Cells:
    """Stamps of one kind: centres (n, 2), long axis (n,) in radians, strength (n,) as a factor on the stain."""

    xy: np.ndarray
    angle: np.ndarray
    strength: np.ndarray


@dataclass
class Anatomy:
    """All that is drawn on the shapes of a plan."""

    glands: dict[str, Glands] = field(default_factory=dict)
    cells: dict[str, Cells] = field(default_factory=dict)
    solid: bool = False  # the lesion grows in sheets
    lakes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))  # blood: x, y, radius
    follicles: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))  # lymphoid aggregates: x, y, radius


class _Builder:
    """Collects cells by kind."""

    def __init__(self, plan: Plan, flow: np.ndarray, rng: np.random.Generator):
        self.plan, self.rng, self.anatomy = plan, rng, Anatomy()
        rise_y, rise_x = np.gradient(flow)
        self.fibre = np.arctan2(-rise_x, rise_y)
        self.parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, kind: str, xy: np.ndarray, angle: np.ndarray | None = None) -> None:
        angle = self.rng.uniform(0, np.pi, len(xy)) if angle is None else angle
        self.parts.setdefault(kind, []).append((xy, angle))

    def lattice(self, pitch: float, jitter: float) -> np.ndarray:
        """Points of a shaken hexagonal lattice over the field, (n, 2)."""
        size = self.plan.size_um
        rows, columns = int(size / (pitch * 0.866)) + 2, int(size / pitch) + 2
        x = np.arange(columns) * pitch + self.rng.uniform(-pitch, 0)
        y = np.arange(rows) * pitch * 0.866 + self.rng.uniform(-pitch, 0)
        x, y = np.meshgrid(x, y)
        x[::2] += pitch / 2
        points = np.stack([x.ravel(), y.ravel()], 1)
        points += self.rng.uniform(-jitter * pitch, jitter * pitch, points.shape)
        return points[((points >= 0) & (points < size)).all(1)]

    def along_fibres(self, xy: np.ndarray) -> np.ndarray:
        return self.plan.at(self.fibre, xy[:, 0], xy[:, 1]) + self.rng.normal(0, 0.2, len(xy))

    def depth(self, name: str, xy: np.ndarray) -> np.ndarray:
        return self.plan.at(getattr(self.plan, name), xy[:, 0], xy[:, 1])


def draw_flow(rng: np.random.Generator, plan: Plan, turn: float) -> np.ndarray:
    """A field whose level lines are the stroma's fibres: parallel in direction `turn`, bent by smooth random waves.

    Returns:
        (n, n) float32 on the plan's raster, micrometres.
    """
    n = len(plan.tissue)
    knots = int(np.ceil(plan.size_um / KNOT_UM)) + 1
    bend = ndimage.zoom(rng.standard_normal((knots, knots)), n / knots, order=3, mode="nearest", grid_mode=True)
    centre = (np.arange(n) + 0.5) * plan.cell
    straight = centre[:, None] * np.cos(turn) - centre * np.sin(turn)
    return (straight + 55 * bend).astype(np.float32)


def grow(plan: Plan, flow: np.ndarray, truth_rng: np.random.Generator, look_rng: np.random.Generator) -> Anatomy:
    """Fill a plan with glands and cells.

    Args:
        plan: the shapes.
        flow: see `draw_flow`.
        truth_rng: for what belongs to the lesion.
        look_rng: for what varies from slide to slide whatever the diagnosis.
    """
    lesion = _Builder(plan, flow, truth_rng)
    host = _Builder(plan, flow, look_rng)
    anatomy = lesion.anatomy
    _distractors(host, anatomy)
    _host_tissue(host, anatomy)
    if plan.truth.diagnosis != "normal":
        _lesion_tissue(lesion, anatomy)
    mitoses = lesion.parts.get("mitosis", [(np.zeros((0, 2)), np.zeros(0))])[0][0]
    for builder in (host, lesion):
        for kind, parts in builder.parts.items():
            xy = np.concatenate([xy for xy, _ in parts])
            angle = np.concatenate([angle for _, angle in parts])
            keep = builder.depth("tissue", xy) > 2
            if kind not in ("dust", "mitosis"):
                keep &= builder.depth("necrosis", xy) < 0
                if len(mitoses):
                    keep &= cKDTree(mitoses).query(xy, distance_upper_bound=10.5)[0] > 10
            xy, angle = xy[keep], angle[keep]
            strength = builder.rng.uniform(0.8, 1.15, len(xy))
            if kind in anatomy.cells:
                old = anatomy.cells[kind]
                xy, angle = np.concatenate([old.xy, xy]), np.concatenate([old.angle, angle])
                strength = np.concatenate([old.strength, strength])
            anatomy.cells[kind] = Cells(xy.astype(np.float32), angle.astype(np.float32), strength.astype(np.float32))
    return anatomy


def _distractors(host: _Builder, anatomy: Anatomy) -> None:
    """Blood and lymphoid aggregates: dark or red areas that mean nothing, on any slide alike."""
    area = (host.plan.size_um / 1000) ** 2
    for name, per_mm2, low, high in (("lakes", 1.2, 15, 36), ("follicles", 0.9, 35, 70)):
        found = []
        for radius in host.rng.uniform(low, high, host.rng.poisson(per_mm2 * area)):
            # Many places are tried, so that a lesion moves such a structure and does not remove it.
            xy = host.rng.uniform(0, host.plan.size_um, (200, 2))
            clear = (host.depth("lesion", xy) < -radius - 12) & (host.depth("tissue", xy) > radius + 10)
            if clear.any():
                found.append((*xy[clear.argmax()], radius))
        setattr(anatomy, name, np.array(found).reshape(-1, 3))


def _host_tissue(host: _Builder, anatomy: Anatomy) -> None:
    rng = host.rng
    style = GLANDS["crypt"]
    centres = host.lattice(style.pitch, 0.12)
    centres = centres[host.depth("tissue", centres) > style.radius[1]]
    # The number of crypts is drawn before it is known where the lesion leaves room: it tells nothing about the lesion.
    wanted = int(len(centres) * rng.uniform(0.22, 0.45))
    centres = centres[host.depth("lesion", centres) < -style.radius[1] - 4]
    for x, y, radius in np.concatenate([anatomy.lakes, anatomy.follicles]):
        centres = centres[np.hypot(*(centres - (x, y)).T) > radius + style.radius[1]]
    anatomy.glands["crypt"] = crypts = _glands(rng, style, rng.permutation(centres)[:wanted])
    _line(host, style, crypts)
    stroma = host.lattice(rng.uniform(17, 22), 0.5)
    stroma = stroma[(host.depth("lesion", stroma) < 0) & ~_inside(crypts, stroma)]
    immune = rng.random(len(stroma)) < rng.uniform(0.25, 0.55)
    host.add("spindle", stroma[~immune], host.along_fibres(stroma[~immune]))
    host.add("lymphocyte", stroma[immune])
    for x, y, radius in anatomy.follicles:
        n = int((radius / 6.0) ** 2 * 3)
        distance, turn = radius * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
        host.add("lymphocyte", np.column_stack([x + distance * np.cos(turn), y + distance * np.sin(turn)]))


def _lesion_tissue(lesion: _Builder, anatomy: Anatomy) -> None:
    rng, truth = lesion.rng, lesion.plan.truth
    kind = "adenoma" if truth.diagnosis == "adenoma" else GRADE_GLANDS.get(truth.grade)
    viable = None
    if kind is None:
        anatomy.solid = True
        cells = lesion.lattice(9.6, 0.33)
        cells = cells[lesion.depth("nests", cells) > 3]
        bizarre = rng.random(len(cells)) < 0.3
        lesion.add("atypical", cells[~bizarre])
        lesion.add("bizarre", cells[bizarre])
        viable = cells
    else:
        style = GLANDS[kind]
        centres = lesion.lattice(style.pitch, 0.08)
        glands = _glands(rng, style, centres, size=_fit(lesion.depth("nests", centres), style))
        keep = glands.radius > 0.45 * style.radius[0]
        glands = Glands(
            glands.x[keep], glands.y[keep], glands.radius[keep], glands.harmonics[keep], glands.lumen[keep]
        )
        centres = np.column_stack([glands.x, glands.y])
        clear = lesion.depth("necrosis", centres) < 0.3 * glands.radius
        anatomy.glands[kind] = glands = Glands(
            glands.x[clear], glands.y[clear], glands.radius[clear], glands.harmonics[clear], glands.lumen[clear]
        )
        viable = _line(lesion, style, glands)
    between = lesion.lattice(15, 0.5)
    between = between[lesion.depth("lesion", between) > 0]
    between = between[
        (lesion.depth("nests", between) < 0) if kind is None else ~_inside(anatomy.glands[kind], between)
    ]
    immune = rng.random(len(between)) < 0.25
    lesion.add("lymphocyte", between[immune])
    lesion.add("spindle", between[~immune], lesion.along_fibres(between[~immune]))
    dust = lesion.lattice(7.0, 0.5)
    dust = dust[lesion.depth("necrosis", dust) > 2]
    lesion.add("dust", dust[rng.random(len(dust)) < 0.6])
    # Dark bodies without a halo: what mitoses are mistaken for, as many with few mitoses as with many.
    debris = viable[lesion.depth("nests", viable) > 4]
    count = round(rng.uniform(0, APOPTOSES) * truth.area_mm2)
    lesion.add("apoptosis", rng.permutation(debris)[:count] + rng.normal(0, 2, (min(count, len(debris)), 2)))
    if truth.mitoses:
        open_ground = viable[(lesion.depth("lesion", viable) > 8) & (lesion.depth("necrosis", viable) < -8)]
        if len(open_ground) < truth.mitoses:
            field = lesion.lattice(8.0, 0.3)
            open_ground = field[(lesion.depth("lesion", field) > 4) & (lesion.depth("necrosis", field) < -4)]
        lesion.add("mitosis", _spread(rng, open_ground, truth.mitoses))


def _fit(depth: np.ndarray, style: GlandStyle) -> np.ndarray:
    """Radius factor that keeps a gland inside the lesion: small ones near its edge, none outside."""
    return np.clip((depth + 0.45 * style.radius[0]) / style.radius[1], 0, 1)


def _glands(
    rng: np.random.Generator, style: GlandStyle, centres: np.ndarray, size: np.ndarray | float = 1.0
) -> Glands:
    n = len(centres)
    turn2, turn3 = rng.uniform(0, 2 * np.pi, (2, n))
    second, third = rng.uniform(0.3, 1, n) * style.stretch, rng.uniform(0.2, 1, n) * style.wobble
    harmonics = np.column_stack(
        [second * np.cos(turn2), second * np.sin(turn2), third * np.cos(turn3), third * np.sin(turn3)]
    )
    radius = rng.uniform(*style.radius, n) * size
    return Glands(centres[:, 0], centres[:, 1], radius, harmonics, rng.uniform(*style.lumen, n))


def _line(builder: _Builder, style: GlandStyle, glands: Glands) -> np.ndarray:
    """Nuclei (and goblet cells, further lumina) of glands; returns the nuclei's centres (n, 2)."""
    rng, nuclei = builder.rng, []
    for row in style.rows:
        index, turn = _ring(rng, glands, row, style.spacing)
        reach = np.clip(row + rng.normal(0, 0.025, len(index)), 0, 0.97)
        nuclei.append(_polar(glands, index, turn, reach))
        builder.add(style.nucleus, nuclei[-1], turn)
    if style.goblets:
        for row, size in ((0.66, "goblet"), (0.47, "vacuole")):
            index, turn = _ring(rng, glands, row, 10 / style.goblets)
            builder.add(size, _polar(glands, index, turn, row + rng.uniform(-0.04, 0.04, len(index))), turn)
    if style.lumina and len(glands):
        index, turn = _ring(rng, glands, 0.55, 21.0)
        holes = _polar(glands, index, turn, rng.uniform(0.45, 0.64, len(index)))
        builder.add("lumen", holes)
        packed = builder.lattice(style.fill, 0.3)
        free = cKDTree(holes).query(packed)[0] > 10.5 if len(holes) else np.ones(len(packed), bool)
        packed = packed[_inside(glands, packed, 0.86) & free]
        builder.add(style.nucleus, packed)
        nuclei.append(packed)
    return np.concatenate(nuclei)


def _ring(rng: np.random.Generator, glands: Glands, row: float, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Gland index and direction of points about `spacing` apart along the ring at `row` of the radius."""
    count = np.maximum(np.round(2 * np.pi * glands.radius * row / spacing), 3).astype(int)
    index = np.repeat(np.arange(len(glands)), count)
    step = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    turn = 2 * np.pi * (step + rng.uniform(-0.25, 0.25, len(index))) / count[index]
    return index, turn + rng.uniform(0, 2 * np.pi, len(glands))[index]


def _polar(glands: Glands, index: np.ndarray, turn: np.ndarray, reach: np.ndarray | float) -> np.ndarray:
    radius = glands.outline(index, turn) * reach
    return np.column_stack([glands.x[index] + radius * np.cos(turn), glands.y[index] + radius * np.sin(turn)])


def _inside(glands: Glands, xy: np.ndarray, reach: float = 1.03) -> np.ndarray:
    """Which points lie within `reach` of the outline of a gland (of the nearest two), (n,) bool."""
    found = np.zeros(len(xy), bool)
    if not len(glands) or not len(xy):
        return found
    _, nearest = cKDTree(np.column_stack([glands.x, glands.y])).query(xy, k=min(2, len(glands)))
    for index in nearest.reshape(len(xy), -1).T:
        dx, dy = xy[:, 0] - glands.x[index], xy[:, 1] - glands.y[index]
        found |= np.hypot(dx, dy) < reach * glands.outline(index, np.arctan2(dy, dx))
    return found


def _spread(rng: np.random.Generator, points: np.ndarray, count: int) -> np.ndarray:
    """`count` of the points, at least 14 um apart as long as there is room."""
    order = points[rng.permutation(len(points))]
    chosen = np.zeros((0, 2))
    for apart in (14.0, 6.0, 0.0):
        for point in order:
            if len(chosen) == count:
                return chosen
            if not len(chosen) or np.hypot(*(chosen - point).T).min() > apart:
                chosen = np.vstack([chosen, point])
    return chosen
