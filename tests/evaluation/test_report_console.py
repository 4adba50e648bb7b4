"""What the console tells of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report_page import made_up, summary_of
from frugalpath.evaluation.report.console import print_outcome
from frugalpath.evaluation.report.page import tiles
from frugalpath.evaluation.report.tables import measures


def test_the_random_allocator_is_told_with_what_it_costs(capsys):
    summary = summary_of(made_up(60))
    print_outcome(summary, Path("report"))
    told = capsys.readouterr().out
    (row,) = [line for line in told.splitlines() if line.startswith("random")]
    random, largest = summary["operating_random"]["flops"], summary["static"][-1]["flops"]
    assert row.startswith("random, same mean budget") and row.endswith(f"{random / largest:.3f}")
    assert "same cost" not in told and "pays for no probe" in told


@pytest.mark.parametrize(
    ("lost", "told", "by"),
    [
        (0, "60 test cases of 20 patients;", "patient"),
        (
            60,
            "60 test cases (no patients given: each case counts as one, so intervals may be too narrow);",
            "case",
        ),
        (5, "60 test cases of 20 patients (5 cases without a patient: each counts as one, so", "patient"),
    ],
)
def test_patients_are_told_as_the_data_name_them(capsys, lost, told, by):
    summary = summary_of(made_up(60)) | {"n_without_patient": lost}
    print_outcome(summary, Path("report"))
    out = capsys.readouterr().out
    assert told in out and f"95 % intervals by {by}\n" in out
    assert ("no patients given" in tiles(summary)[0][2]) == (lost == 60)


def test_numbers_are_told_as_one_writes_them():
    summary = summary_of(made_up(60))
    summary["static"][-1]["tokens"] = 49.0
    assert tiles(summary)[1][2].endswith("the largest budget takes 49")
    summary["static"][-1]["tokens"] = 48.26
    assert tiles(summary)[1][2].endswith("the largest budget takes 48.3")
    summary["information"]["image_kinds"] = 1
    assert "(1 kind)" in str(measures(summary)["What the chosen budget depends on"])
