"""Warnings of a report: what its results do not support."""

from __future__ import annotations

from frugalpath.evaluation.run import EvaluationResult
from frugalpath.rewards.answer import extract_answer

UNREADABLE = 0.05
"""Share of unreadable answers at a budget above which the report warns."""
RIVALS = {"gain_over_majority": "the majority answer", "gain_over_text_only": "the model without an image"}


def warnings_of(outcome: EvaluationResult) -> list[str]:
    """Return the warnings that a reader of these results should see first."""
    return [*_patients(outcome), *_rivals(outcome), *_unreadable(outcome)]


def _patients(outcome: EvaluationResult) -> list[str]:
    n = len(outcome.cases)
    lost = sum(not case.patient_named for case in outcome.cases)
    if not lost:
        return []
    who = "no patients are given" if lost == n else f"{lost} of {n} test cases have no patient"
    return [
        f"{who}: each case counts as its own patient, so intervals may be too narrow and a patient may be in several "
        "splits; give patients in a column `patient`, or by patient_column or patient_pattern"
    ]


def _rivals(outcome: EvaluationResult) -> list[str]:
    found = []
    for key, gain in outcome.gains.items():
        low, high = gain["ci95"]
        if key in RIVALS and low <= 0:
            found.append(
                f"the operating point is not significantly above {RIVALS[key]} ({gain['value']:+.3f}, {low:+.3f} to "
                f"{high:+.3f}): there is no evidence that the image helps, so saving tokens proves little"
            )
    return found


def _unreadable(outcome: EvaluationResult) -> list[str]:
    """Warn of budgets with more than a few unreadable answers."""
    table = outcome.whole
    shares = {
        budget: sum(extract_answer(row[k]) is None for row in table.text) / len(table.text)
        for k, budget in enumerate(table.budgets)
    }
    told = [f"{s:.0%} at {f'{b} tokens' if b else 'no image'}" for b, s in shares.items() if s > UNREADABLE]
    if not told:
        return []
    return [
        f"unreadable answers: {', '.join(told)}; raise max_completion_length if they are cut off, else train the "
        "warm start longer or give the reward `format` more weight"
    ]
