"""Format the results of the doctor as text and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from frugalpath.doctor.fit import GB, Phase, Place, Weights, peak
from frugalpath.doctor.jobs import Sizes
from frugalpath.doctor.knobs import HARM, Knob
from frugalpath.doctor.machine import Check, Speed
from frugalpath.doctor.speed import Cost, step_seconds


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and time of a recipe.

    Args:
        weights: weights as GRPO trains them.
        limit: usable memory in bytes.
        knobs: suggested changes; empty if it fits.
    """

    weights: Weights
    phases: Sequence[Phase]
    costs: Sequence[Cost]
    limit: float
    knobs: Sequence[Knob]
    place: Place
    sizes: Sizes
    speed: Speed
    mfu: float

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return peak(self.phases).peak <= self.limit


def as_json(machine: Sequence[Check], needed: Sequence[Check], found: Estimate | None) -> dict[str, Any]:
    """All results as JSON values, in bytes, FLOPs and seconds."""
    out: dict[str, Any] = {
        "machine": [dataclasses.asdict(c) for c in machine],
        "needs": [dataclasses.asdict(c) for c in needed],
    }
    if found is not None:
        out["fit"] = {
            "fits": found.fits,
            "limit": found.limit,
            "peak": peak(found.phases).peak,
            "weights": dataclasses.asdict(found.weights),
            "phases": [{**dataclasses.asdict(p), "peak": p.peak} for p in found.phases],
            "costs": [dataclasses.asdict(c) for c in found.costs],
            "step_seconds": step_seconds(found.costs),
            "knobs": [{**dataclasses.asdict(k), "harm": HARM[k.harm]} for k in found.knobs],
            "assumed": {**dataclasses.asdict(found.sizes), "mfu": found.mfu, **dataclasses.asdict(found.speed),
                        **dataclasses.asdict(found.place)},
        }  # fmt: skip
    return out


def as_text(machine: Sequence[Check], needed: Sequence[Check], found: Estimate | None) -> str:
    """The report as text."""
    lines = ["This machine", *map(_line, machine)]
    if needed:
        lines += ["", "The recipe needs", *map(_line, needed)]
    if found is not None:
        lines += ["", *_fit(found)]
    return "\n".join(lines)


def _line(check: Check) -> str:
    mark = {True: "ok", False: "MISSING", None: ""}[check.ok]
    remedy = f"\n{'':10}-> {check.remedy}" if check.remedy and not check.ok else ""
    return f"  {mark:<8}{check.what}: {check.found}{remedy}"


def _fit(found: Estimate) -> list[str]:
    weights, worst = found.weights, peak(found.phases)
    where = f"{found.place.processes} x " if found.place.processes > 1 else ""
    lines = [
        f"Does it fit {where}{found.limit / GB:.1f} GB of {'GPU' if found.place.gpu else 'main'} memory? "
        f"{'yes' if found.fits else 'NO'}: {worst.peak / GB:.1f} GB at the peak, in {worst.name} ({worst.moment})",
        f"  parameters: {weights.frozen / 1e6:,.1f} M frozen, {weights.trained / 1e6:,.1f} M trained, "
        f"{weights.adapters / 1e6:,.1f} M of adapters",
        f"  assumed: {found.sizes.text} text tokens per question; every case at the largest budget",
    ]
    for phase in found.phases:
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in phase.parts.items() if size >= 0.005 * GB)
        lines.append(f"  {phase.name:<14}{phase.peak / GB:7.2f} GB: {parts}")
    lines.append(
        f"  GRPO step: about {step_seconds(found.costs):.3g} s ("
        + ", ".join(
            f"{c.name} {c.seconds:.3g} s, {c.flops / 1e12:.3g} TFLOPs" for c in found.costs if c.name != "evaluation"
        )
        + f"; at {found.mfu:.0%} of {found.speed.flops / 1e12:.3g} TFLOPs a second, {found.speed.source})"
    )
    if found.knobs:
        first = found.knobs[0]
        lines.append(f"  change first: {first.setting}")
        lines += [f"    saves {k.saves / GB:6.2f} GB ({HARM[k.harm]}): {k.setting}" for k in found.knobs]
    return lines
