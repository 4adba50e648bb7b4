"""Warnings about what a report's figures cannot carry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.report_page import made_up
from frugalpath.evaluation.cautions import warnings_of
from frugalpath.evaluation.run import EvaluationResult


@pytest.fixture
def outcome() -> EvaluationResult:
    """Well above its controls, its patients named."""
    made = made_up(300)
    return replace(made, majority=np.zeros(300))


def test_sound_results_have_none(outcome):
    assert warnings_of(outcome) == []


def test_unnamed_patients_are_told(outcome):
    cases = [replace(case, patient_named=False) for case in outcome.cases]
    (warning,) = warnings_of(replace(outcome, cases=cases))
    assert warning.startswith(
        "no patients are given: each case counts as its own patient, so intervals may be too narrow"
    )
    (warning,) = warnings_of(replace(outcome, cases=[*cases[:10], *outcome.cases[10:]]))
    assert warning.startswith("10 of 300 test cases have no patient")


def test_results_that_are_not_above_their_controls_are_told(outcome):
    (warning,) = warnings_of(replace(outcome, majority=outcome.decisions.score))
    assert "not significantly above the majority answer" in warning and "+0.000" in warning
    blind = outcome.whole.score.copy()
    blind[:, 0] = 1
    found = warnings_of(replace(outcome, whole=replace(outcome.whole, score=blind)))
    assert len(found) == 1 and "not significantly above the model without an image" in found[0]


def test_unreadable_answers_are_told_by_budget(outcome):
    text = [list(row) for row in outcome.whole.text]
    for row in text[:30]:
        row[0] = row[2] = "<answer>cut o"
    for row in text[:3]:
        row[1] = "nothing"
    (warning,) = warnings_of(replace(outcome, whole=replace(outcome.whole, text=text)))
    assert f"10% at no image, 10% at {outcome.ladder[1]} tokens;" in warning
