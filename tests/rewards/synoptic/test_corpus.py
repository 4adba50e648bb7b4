"""Summaries of many reports: agreement, means, intervals and what is left out."""

import math

import pytest
from sklearn.metrics import cohen_kappa_score

from frugalpath.rewards.synoptic.corpus import corpus_report, table_text
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.report import Report
from frugalpath.rewards.synoptic.score import score_case

SIMULATOR, BIOPSY = load_protocol("simulator"), load_protocol("biopsy")


def summary(pairs, patients=None):
    scores = [score_case(parse_report(g, SIMULATOR).record, parse_report(s, SIMULATOR), SIMULATOR) for g, s in pairs]
    return corpus_report(scores, SIMULATOR, patients or [f"p{i}" for i in range(len(scores))], resamples=200)


def test_kappa_weighs_by_all_ranks_of_the_protocol():
    # The ranks 1, 2 and 4 occur. Without the third among the labels 4 would count as next to 2.
    gold, said = list("11224412441"), list("12214411242")
    scores = [
        score_case(
            {"diagnoses": [{"diagnosis": "adenocarcinoma", "grade": g}]},
            Report({"diagnoses": [{"diagnosis": "adenocarcinoma", "grade": s}]}),
            BIOPSY,
        )
        for g, s in zip(gold, said, strict=True)
    ]
    row = corpus_report(scores, BIOPSY, list("abcdefghijk"), resamples=100)["fields"]["diagnoses.grade"]
    wanted = cohen_kappa_score(gold, said, labels=list("1234"), weights="quadratic")
    assert wanted != pytest.approx(cohen_kappa_score(gold, said, weights="quadratic"))
    assert (row["kappa"], row["weighting"]) == (pytest.approx(wanted), "quadratic")


def test_kappa_of_unordered_values_has_no_weights_and_needs_two_values():
    said = ["upper left", "lower left", "lower left", "upper right"]
    gold = ["upper left", "lower left", "upper left", "upper right"]
    pairs = [
        (f"Diagnosis: adenoma\nQuadrant: {g}", f"Diagnosis: adenoma\nQuadrant: {s}")
        for g, s in zip(gold, said, strict=True)
    ]
    fields = summary(pairs)["fields"]
    assert fields["quadrant"]["kappa"] == pytest.approx(cohen_kappa_score(gold, said))
    assert fields["quadrant"]["weighting"] == "none"
    assert "kappa" not in fields["diagnosis"]  # adenoma alone occurs


def test_micro_and_macro_means_weigh_cells_and_fields():
    pairs = [
        ("Diagnosis: carcinoma\nTumor size: 10 mm", "Diagnosis: carcinoma\nTumor size: 10.5 mm"),
        ("Diagnosis: adenoma\nTumor size: 10 mm", "Diagnosis: carcinoma\nTumor size: 2 cm"),
        ("Diagnosis: normal", "Diagnosis: normal\nGrade: 2"),
    ]
    found = summary(pairs)
    assert found["n"] == 3
    assert found["non_null_accuracy"]["value"] == pytest.approx(3 / 5)
    assert found["macro_accuracy"]["value"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # 13 cells are null in gold, and all but the grade of the last case are in the report.
    assert found["all_cells_accuracy"]["value"] == pytest.approx((3 + 12) / 18)
    assert found["fields"]["tumour_size_mm"]["mae"] == pytest.approx((0.5 + 10) / 2)
    assert found["hallucinated"]["value"] == pytest.approx(1 / 3)
    assert found["critical_error_free"]["value"] == pytest.approx(2 / 3)
    assert "necrosis" not in found["fields"]
    for name in ("case_score", "non_null_accuracy", "macro_accuracy", "coverage", "completeness"):
        low, high = found[name]["ci95"]
        assert low <= found[name]["value"] <= high, name


def test_cases_that_answer_nothing_give_no_means_of_fields():
    found = summary([("Diagnosis: n/a", "Diagnosis: n/a")] * 2)
    assert found["fields"] == {} and "macro_accuracy" not in found and "case_score" not in found
    assert "non_null_accuracy" not in found and "coverage" not in found
    assert not any(math.isnan(v["value"]) for v in found.values() if isinstance(v, dict) and "value" in v)


def test_the_table_names_every_field_and_mean():
    found = summary([("Diagnosis: carcinoma\nGrade: 2", "Diagnosis: carcinoma\nGrade: 1")] * 2)
    text = table_text(found)
    assert all(name in text for name in ("diagnosis", "grade", "non_null_accuracy", "critical_error_free"))
    assert f"{found['fields']['grade']['credit']:.3f}" == "0.500" and "[0.000, 0.000]" in text  # right or not, no half
