"""How a report tells of patients: where the data name none each case counts as one, which intervals do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_patients(summary: Mapping[str, Any]) -> str:
    """How many patients the test cases are of, after their number."""
    lost, number = summary.get("n_without_patient", 0), summary["n_patients"]
    if lost == summary["n"]:
        return "(no patients named: each case counts as one, so that intervals may be too narrow)"
    told = f"of {number} patient{'' if number == 1 else 's'}"
    if lost:
        told += f" ({lost} cases name none: each counts as one, so that intervals may be too narrow)"
    return told


def unit(summary: Mapping[str, Any]) -> str:
    """What resamples draw and splits keep together."""
    return "case" if summary.get("n_without_patient", 0) == summary["n"] else "patient"
