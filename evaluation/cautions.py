"""Warnings about the test cases of a report: what its figures cannot carry."""

from __future__ import annotations

from frugalpath.evaluation.run import Outcome
from frugalpath.rewards.answer import extract_answer

UNREADABLE = 0.05
"""Share of the answers at a budget without a readable answer above which the report warns."""
RIVALS = {"gain_over_majority": "the majority answer", "gain_over_text_only": "the model without an image"}


def cautions(outcome: Outcome) -> list[str]:
    """What a reader of these results should know first."""
    return [*_patients(outcome), *_rivals(outcome), *_unreadable(outcome)]


def _patients(outcome: Outcome) -> list[str]:
    n = len(outcome.cases)
    lost = sum(not case.patient_named for case in outcome.cases)
    if not lost:
        return []
    who = "no patients named" if lost == n else f"{lost} of {n} test cases name no patient"
    return [
        f"{who}: each case counts as one, so that intervals may be too narrow and a patient may be in several splits; "
        "name patients by a column `patient`, or by patient_column or patient_pattern"
    ]


def _rivals(outcome: Outcome) -> list[str]:
    found = []
    for key, gain in outcome.gains.items():
        low, high = gain["ci95"]
        if key in RIVALS and low <= 0:
            found.append(
                f"the operating point is not above {RIVALS[key]} by its interval ({gain['value']:+.3f}, {low:+.3f} to "
                f"{high:+.3f}): nothing shows that the image helps, and cost that is saved means little"
            )
    return found


def _unreadable(outcome: Outcome) -> list[str]:
    """Of every budget that more than a few answers cannot be read at."""
    table = outcome.whole
    shares = {
        budget: sum(extract_answer(row[k]) is None for row in table.text) / len(table.text)
        for k, budget in enumerate(table.budgets)
    }
    told = [f"{s:.0%} at {f'{b} tokens' if b else 'no image'}" for b, s in shares.items() if s > UNREADABLE]
    if not told:
        return []
    return [
        f"answers without a readable answer: {', '.join(told)}; raise max_completion_length if they are "
        "cut off, else train the warm start longer or give the reward `format` more weight"
    ]
