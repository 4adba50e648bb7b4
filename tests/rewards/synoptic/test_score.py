"""Lists, critical errors and agreement."""

import pytest
from sklearn.metrics import cohen_kappa_score

from rewards.synoptic.corpus import corpus_report
from rewards.synoptic.parse import parse_report
from rewards.synoptic.protocol import load_protocol
from rewards.synoptic.score import score_case
from rewards.synoptic.similarity import similarity

SIMULATOR = load_protocol("simulator")


def case(gold, text):
    return score_case(parse_report(gold, SIMULATOR).record, parse_report(text, SIMULATOR), SIMULATOR)


def test_errors_between_groups_are_critical():
    gold = "Diagnosis: carcinoma\nMargin: involved"
    assert case(gold, "Diagnosis: adenoma\nMargin: clear").critical_errors == ("diagnosis", "margin_status")
    assert case(gold, "Diagnosis: cannot be determined").critical_errors == ()
    assert case("Margin: close", "Margin: clear").critical_errors == ()


def test_kappa_keeps_the_distance_of_ranks_that_do_not_occur():
    gold, said = "11331", "13331"
    scores = [case(f"Diagnosis: carcinoma\nGrade: {g}", f"Grade: {s}") for g, s in zip(gold, said, strict=True)]
    report = corpus_report(scores, SIMULATOR, list("abcde"), resamples=200)
    wanted = cohen_kappa_score(list(gold), list(said), labels=list("123"), weights="quadratic")
    assert report["fields"]["grade"]["kappa"] == pytest.approx(wanted)
    low, high = report["case_score"]["ci95"]
    assert low <= report["case_score"]["value"] <= high


def test_nulls_count_in_all_cells_alone():
    found = case("Diagnosis: normal", "Diagnosis: normal\nTumor size: 3 mm")
    assert (found.non_null_accuracy, found.null_right, found.hallucinated) == (1.0, 4, ("tumour_size_mm",))


@pytest.mark.parametrize(
    "other",
    ["tumor", "no invasive tumor of left lobe 3", "invasive tumor of right lobe 3", "invasive tumor of left lobe 4"],
)
def test_texts_that_mean_something_else(other):
    assert similarity("invasive tumor of left lobe 3", other) < 0.85
