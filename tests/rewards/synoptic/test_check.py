"""Contradictions within records and entries of lists, and what follows from other fields."""

from frugalpath.rewards.synoptic.check import check_record, derive
from frugalpath.rewards.synoptic.protocol import load_protocol

BIOPSY, SIMULATOR = load_protocol("biopsy"), load_protocol("simulator")


def test_contradictions_of_entries_are_named_with_their_number():
    good = {"diagnosis": "acinar adenocarcinoma", "gleason_primary": "3", "gleason_secondary": "4", "grade_group": "2"}
    assert check_record({"diagnoses": [good]}, BIOPSY) == []
    (problem,) = check_record({"diagnoses": [good, {**good, "grade_group": "5"}]}, BIOPSY)
    assert problem.startswith("Diagnoses, 2: Grade group") and "which give 2" in problem


def test_problems_of_a_record():
    record = {"diagnosis": "normal", "grade": "2", "margin_status": "zzz", "colour": 1}
    problems = " / ".join(check_record(record, SIMULATOR))
    assert "'colour' is not a field" in problems and "does not apply" in problems and "'zzz' is not one of" in problems
    assert any("not answered" in p for p in check_record({"diagnosis": "carcinoma"}, SIMULATOR, complete=True))
    assert check_record({"diagnosis": "carcinoma"}, SIMULATOR) == []


def test_derive_fills_what_is_missing_alone():
    breast = load_protocol("breast_resection")
    scores = {"tubule_score": "3", "nuclear_score": "2", "mitotic_score": "1"}
    assert derive(scores, breast) == {**scores, "nottingham_total": 6, "nottingham_grade": "2"}
    assert derive({**scores, "nottingham_grade": "3"}, breast)["nottingham_grade"] == "3"
