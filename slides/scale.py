"""Find the pixel size of a slide and its source. An unknown scale is an error, never assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MIN_MPP, MAX_MPP = 0.05, 20.0
# The two axes may differ by this fraction; scanners and DICOM writers round each for itself.
ANISOTROPY = 0.05


class SlideError(Exception):
    """Reason why a slide cannot be extracted; it is reported, and the other slides continue."""


@dataclass(frozen=True)
class Scale:
    """Microns per pixel at level 0, the property or setting it comes from, and notes for the user."""

    mpp: float
    source: str
    notes: tuple[str, ...] = ()


def plausible(mpp: float) -> bool:
    """Whether a value can be the microns per pixel of a slide's level 0."""
    return math.isfinite(mpp) and MIN_MPP <= mpp <= MAX_MPP


def find_scale(
    properties: Mapping[str, str],
    *,
    manifest_mpp: float | None = None,
    flag_mpp: float | None = None,
    override: bool = False,
) -> Scale:
    """Find the scale of a slide: its recorded mpp, else its objective power, the manifest's value, or the flag's.

    Args:
        properties: OpenSlide's properties.
        manifest_mpp: level-0 microns per pixel from the slide's row of the manifest.
        flag_mpp: the same from `--slide-mpp`, for every slide that records none.
        override: prefer the manifest's and the flag's value over the file's.

    Raises:
        SlideError: none of them is known; the message states what was read from which property, and the remedy.
    """
    given = [(manifest_mpp, "the manifest's mpp"), (flag_mpp, "--slide-mpp")]
    stated = [Scale(mpp, source) for mpp, source in given if mpp is not None]
    recorded, problems = _recorded(properties)
    found = stated + recorded if override else recorded + stated
    if not found:
        raise SlideError(
            f"unknown scale: {'; '.join(problems)}; no mpp in the manifest and no --slide-mpp. State the microns per "
            "pixel of level 0 in the manifest's column mpp or with --slide-mpp"
        )
    scale, others = found[0], found[1:]
    notes = [f"{problem}: counted as missing" for problem in problems if "absent" not in problem]
    for other in others:
        if other.source == "--slide-mpp":  # meant for slides that record nothing: no contradiction
            continue
        if not 0.5 < scale.mpp / other.mpp < 2 or (other in stated and abs(scale.mpp / other.mpp - 1) > ANISOTROPY):
            notes.append(
                f"{scale.source} gives {scale.mpp:.4g} mpp, {other.source} {other.mpp:.4g}: the first is used"
            )
    return Scale(scale.mpp, scale.source, tuple(notes))


def _recorded(properties: Mapping[str, str]) -> tuple[list[Scale], list[str]]:
    """Scales recorded in the file, best first, and problems of the others."""
    scales, problems = [], []
    texts = [properties[key] for key in ("openslide.mpp-x", "openslide.mpp-y") if key in properties]
    if len(texts) < 2:
        keys = [key for key in ("tiff.XResolution", "tiff.ResolutionUnit") if key in properties]
        raw = ", ".join(f"{key} = {properties[key]}" for key in keys)
        problems.append(f"openslide.mpp-x is absent ({raw})" if raw else "openslide.mpp-x is absent")
    else:
        mpp_x, mpp_y = (_number(text) for text in texts)
        read = f"openslide.mpp-x = {texts[0]} and openslide.mpp-y = {texts[1]}"
        if not (plausible(mpp_x) and plausible(mpp_y)):
            problems.append(f"{read} are outside {MIN_MPP} to {MAX_MPP:g}")
        elif abs(mpp_x / mpp_y - 1) > ANISOTROPY:
            problems.append(f"{read} differ by more than {ANISOTROPY:.0%}")
        else:
            scales.append(Scale((mpp_x + mpp_y) / 2, "openslide.mpp-x"))
    text = properties.get("openslide.objective-power")
    if text is None:
        problems.append("openslide.objective-power is absent")
    else:
        # A 10x objective gives 1 micron per pixel on the cameras of all common scanners, to about 10 %.
        power = _number(text)
        if power > 0 and plausible(10 / power):
            scales.append(Scale(10 / power, "openslide.objective-power"))
        else:
            problems.append(f"openslide.objective-power = {text} is not a valid magnification")
    return scales, problems


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
