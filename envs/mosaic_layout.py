"""Where the lesions of a mosaic lie, and what follows from it: boxes, area, quadrant and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from frugalpath.envs.boxes import to_frame

KINDS = {"none": 0.2, "focal-1": 0.3, "focal-2": 0.15, "focal-3": 0.15, "diffuse": 0.2}
"""Share of each kind of mosaic: as many of the kinds of one question's answers as balance needs, single regions twice
because they are spread over four quadrants."""
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
MAX_REGIONS = 3
DIFFUSE = (0.7, 1.0)  # share of lesion tiles in a diffuse mosaic
_ATTEMPTS = 10_000


@dataclass(frozen=True)
class Region:
    """A rectangle of lesion tiles: `height` x `width` tiles from tile (`row`, `column`) on."""

    row: int
    column: int
    height: int
    width: int

    def apart(self, other: Region) -> bool:
        """Whether at least one background tile lies between the two, corners included."""
        return (
            self.row > other.row + other.height
            or other.row > self.row + self.height
            or self.column > other.column + other.width
            or other.column > self.column + self.width
        )


@dataclass(frozen=True, eq=False)
class Layout:
    """One mosaic before tiles are drawn.

    Args:
        kind: a key of `KINDS`.
        regions: the focal regions; empty for `none` and `diffuse`.
        lesion: bool (grid, grid), which tiles are lesion.
        background, lesion_label: the two classes of its tiles.
    """

    kind: str
    regions: tuple[Region, ...]
    lesion: np.ndarray
    background: str
    lesion_label: str

    @property
    def area(self) -> float:
        """Share of lesion tiles."""
        return float(self.lesion.mean())

    @property
    def quadrant(self) -> str | None:
        """Quadrant of the centre of the only region; None when it lies on a midline or the regions are not one."""
        if len(self.regions) != 1:
            return None
        region, grid = self.regions[0], len(self.lesion)
        down, right = 2 * region.row + region.height - grid, 2 * region.column + region.width - grid
        return QUADRANTS[2 * (down > 0) + (right > 0)] if down and right else None

    def boxes(self, margin: int = 0) -> list[list[int]]:
        """Boxes of the regions in 0..1000 in reading order; `margin` tiles of glass surround the mosaic."""
        side = len(self.lesion) + 2 * margin
        corners = [
            (r.column + margin, r.row + margin, r.column + margin + r.width, r.row + margin + r.height)
            for r in sorted(self.regions, key=lambda r: (r.row, r.column))
        ]
        return to_frame(corners, side, side)


def draw_layouts(
    n: int,
    grid: int,
    sides: tuple[int, int],
    backgrounds: Sequence[str],
    lesions: Sequence[str],
    seed: Sequence[int],
    kinds: Sequence[str] | None = None,
) -> list[Layout]:
    """Layouts of `n` given kinds, or of those of `KINDS` in their shares, shuffled.

    Sides of regions are `sides[0]`..`sides[1]` tiles.
    """
    rng = np.random.default_rng(list(seed))
    if kinds is None:
        quota = np.floor(np.array(list(KINDS.values())) * n).astype(int)
        order = np.argsort(quota - np.array(list(KINDS.values())) * n, kind="stable")
        quota[order[: n - quota.sum()]] += 1
        kinds = rng.permutation(np.repeat(list(KINDS), quota)).tolist()
    layouts, singles = [], 0
    for i, kind in enumerate(kinds):
        lesion = np.zeros((grid, grid), bool)
        regions: list[Region] = []
        if kind == "diffuse":
            n_lesion = round(rng.uniform(*DIFFUSE) * grid * grid)
            lesion.flat[rng.permutation(grid * grid)[:n_lesion]] = True
        elif kind != "none":
            regions = _place(int(kind[-1]), grid, sides, rng)
            if len(regions) == 1:
                # Mirrored so that each quadrant gets as many, without touching how far from the middle regions lie.
                regions = [_mirror(regions[0], grid, singles % 4)]
                singles += 1
        for r in regions:
            lesion[r.row : r.row + r.height, r.column : r.column + r.width] = True
        layouts.append(
            Layout(str(kind), tuple(regions), lesion, backgrounds[i % len(backgrounds)], lesions[i % len(lesions)])
        )
    return layouts


def case_kinds(cases: int, size: int, seed: Sequence[int]) -> list[str]:
    """Kinds of mosaics (keys of `KINDS`), case by case.

    In turn a case has a lesion on one mosaic (at every place equally often), on none, and on several (2 to `size`).
    """
    rng = np.random.default_rng(list(seed))
    names = [kind for kind in KINDS if kind != "none"]
    shares = np.array([KINDS[kind] for kind in names])
    kinds: list[str] = []
    for i in range(cases):
        turn, kind = divmod(i, 3)
        if kind == 0:
            places = [turn % size]
        else:
            places = [] if kind == 1 else rng.permutation(size)[: 2 + turn % (size - 1)].tolist()
        drawn = rng.choice(names, size, p=shares / shares.sum())
        kinds += [str(drawn[place]) if place in places else "none" for place in range(size)]
    return kinds


def can_hold(grid: int, sides: tuple[int, int]) -> bool:
    """Whether `MAX_REGIONS` regions with a gap fit for certain: the smallest ones do, two beside each other."""
    return 1 <= sides[0] <= sides[1] <= grid // 2 and 2 * sides[0] + 1 <= grid


def _place(n: int, grid: int, sides: tuple[int, int], rng: np.random.Generator) -> list[Region]:
    """`n` regions, uniform over sizes and places among those with a tile between any two."""
    for _ in range(_ATTEMPTS):
        regions = []
        for _ in range(n):
            height, width = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
            row, column = int(rng.integers(grid - height + 1)), int(rng.integers(grid - width + 1))
            regions.append(Region(row, column, height, width))
        if all(a.apart(b) for i, a in enumerate(regions) for b in regions[:i]):
            return regions
    raise RuntimeError(f"no place for {n} regions of {sides} tiles in a grid of {grid}")


def _mirror(region: Region, grid: int, quadrant: int) -> Region:
    row, column = region.row, region.column
    down, right = divmod(quadrant, 2)
    if (2 * row + region.height > grid) != bool(down):
        row = grid - row - region.height
    if (2 * column + region.width > grid) != bool(right):
        column = grid - column - region.width
    return Region(row, column, region.height, region.width)
