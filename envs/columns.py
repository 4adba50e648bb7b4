"""Cases as the columns that reward functions get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envs.case import Case


def case_columns(case: Case, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Columns of a case as reward functions get them; `extra` are the further columns of the whole set."""
    return {
        "id": case.id,
        "patient": case.patient,
        "task": case.task,
        "question": case.question,
        "answer": case.answer,
        "options": list(case.options) if case.options else None,
        "protocol": case.protocol,
        **{k: case.extra.get(k) for k in extra},
    }


def extra_columns(cases: Sequence[Case]) -> list[str]:
    """Names of all further columns that any of the cases has."""
    return sorted({k for c in cases for k in c.extra})
