"""What is asked about a simulated slide: kinds of question, their options, and the answer that follows from its truth.

A truth here is `Truth.as_dict()`, as it is stored in `truth.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envs.boxes import boxes_text
from envs.specimen import DIAGNOSES, MITOSES_CUT, QUADRANTS, close_cut, size_cuts

QUESTIONS = ("diagnosis", "grade", "necrosis", "size", "margin", "quadrant", "boxes", "mitoses", "synoptic", "report")
PROTOCOL = "simulator"  # of the answers to `synoptic`
STEP = 20  # of box coordinates, in thousandths of the slide: a tenth of a small focus


@dataclass(frozen=True)
class Asked:
    """A question as it is put, its options (None for all but choices), its answer and its task."""

    prompt: str
    options: tuple[str, ...] | None
    answer: str
    task: str = "choice"


def ask(kind: str, truth: Mapping[str, Any], size_mm: float) -> Asked | None:
    """The question of a kind about a slide, or None where it does not arise (the grade of an adenoma).

    Args:
        kind: one of `QUESTIONS`.
        truth: of the slide.
        size_mm: side of the slide, with which the cut-offs in millimetres scale.
    """
    cancer, lesion = truth["diagnosis"] == "carcinoma", truth["size_mm"] is not None
    low, high = size_cuts(size_mm)
    close = close_cut(size_mm)
    if kind == "diagnosis":
        return Asked("What is the diagnosis?", DIAGNOSES, truth["diagnosis"])
    if kind == "grade" and cancer:
        return Asked(
            "What is the grade of the carcinoma?", ("grade 1", "grade 2", "grade 3"), f"grade {truth['grade']}"
        )
    if kind == "necrosis" and cancer:
        return Asked("Is there tumour necrosis?", ("present", "absent"), "present" if truth["necrosis"] else "absent")
    if kind == "size" and lesion:
        options = (f"under {low:g} mm", f"{low:g} to {high:g} mm", f"over {high:g} mm")
        answer = options[(truth["size_mm"] >= low) + (truth["size_mm"] >= high)]
        return Asked("What is the greatest dimension of the largest focus of the lesion?", options, answer)
    if kind == "margin" and lesion:
        prompt = (
            "What is the status of the inked margins? "
            f"Involved: the lesion reaches ink. Close: it comes within {close:g} mm. Clear: it does not."
        )
        return Asked(prompt, ("involved", "close", "clear"), margin_status(truth, size_mm))
    if kind == "quadrant" and (truth["quadrant"] is not None or not lesion):
        return Asked(
            "Which quadrant of the slide holds most of the lesion?",
            (*QUADRANTS, "none"),
            truth["quadrant"] if lesion else "none",
        )
    if kind == "boxes":
        prompt = f"Give a box [x1, y1, x2, y2] in 0..1000, to the nearest {STEP}, for each focus of the lesion."
        return Asked(
            prompt, None, boxes_text([[STEP * round(v / STEP) for v in box] for box in truth["boxes"]]), "detection"
        )
    if kind == "mitoses" and cancer:
        prompt = f"Is the mitotic count of the tumour low or high? High: at least {MITOSES_CUT:g} per mm2."
        return Asked(prompt, ("low", "high"), "high" if truth["mitoses_per_mm2"] >= MITOSES_CUT else "low")
    if kind == "synoptic" and (truth["quadrant"] is not None or not lesion):
        return Asked("Write the synoptic report of this slide.", None, report_text(truth, size_mm), "synoptic")
    if kind == "report" and (truth["quadrant"] is not None or not lesion):
        return Asked("Describe the findings of this slide in one sentence.", None, report_sentence(truth), "open")
    return None


def report_text(truth: Mapping[str, Any], size_mm: float) -> str:
    """The report of a slide in the lines of the protocol `simulator`; fields that do not apply have no line."""
    known = synoptic(truth, size_mm)
    names = ("diagnosis", "grade", "necrosis", "quadrant", "margin_status")
    lines = [f"{name.partition('_')[0].capitalize()}: {known[name]}" for name in names if known[name] is not None]
    return "\n".join(lines)


def report_sentence(truth: Mapping[str, Any]) -> str:
    """The findings as dictated, always in the same words; a lesion needs a clear quadrant."""
    parts = [truth["diagnosis"].capitalize()]
    if truth["diagnosis"] == "carcinoma":
        parts.append(f"grade {truth['grade']}")
    if truth["size_mm"] is not None:
        parts.append(f"mostly in the {truth['quadrant']} quadrant")
    if truth["diagnosis"] == "carcinoma":
        parts.append(f"{'with' if truth['necrosis'] else 'without'} necrosis")
    return ", ".join(parts) + "."


def margin_status(truth: Mapping[str, Any], size_mm: float) -> str:
    """Margin class of a lesion: `involved`, `close` or `clear`."""
    if truth["margin_mm"] == 0:
        return "involved"
    return "close" if truth["margin_mm"] < close_cut(size_mm) else "clear"


def synoptic(truth: Mapping[str, Any], size_mm: float) -> dict[str, Any]:
    """All that is known about a slide as the fields of a synoptic report; None where a field does not apply."""
    lesion, cancer = truth["size_mm"] is not None, truth["diagnosis"] == "carcinoma"
    return {
        "diagnosis": truth["diagnosis"],
        "grade": truth["grade"],
        "tumour_size_mm": truth["size_mm"],
        "tumour_foci": truth["foci"],
        "tumour_area_mm2": truth["area_mm2"],
        "quadrant": truth["quadrant"],
        "margin_status": margin_status(truth, size_mm) if lesion else None,
        "margin_distance_mm": truth["margin_mm"],
        "necrosis": ("present" if truth["necrosis"] else "absent") if cancer else None,
        "mitotic_count": truth["mitoses"] if cancer else None,
        "mitoses_per_mm2": truth["mitoses_per_mm2"],
    }
