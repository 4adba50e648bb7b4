"""Biopsy reports: real ones, where there are any, and unseen ones."""

import json
from collections import Counter
from pathlib import Path

import pytest

from frugalpath.rewards.synoptic.biopsy import lost_words
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.render import render_report

DATA = Path(__file__).parents[4] / "shared/data/reports/biopsy_reports.jsonl"
BIOPSY = load_protocol("biopsy")


def returns(text, record, layout):
    shown = render_report(record, BIOPSY, layout)
    return parse_report(shown, BIOPSY).record == record and (layout != "biopsy" or not lost_words(text, shown))


@pytest.mark.skipif(not DATA.is_file(), reason="needs the biopsy reports")
def test_real_reports_are_read_and_come_back():
    counts = Counter(json.loads(line)["report"] for line in DATA.read_text().splitlines())
    for weight in (lambda n: n, lambda n: 1):
        read = back = total = 0
        for text, n in counts.items():
            report, total = parse_report(text, BIOPSY), total + weight(n)
            if not report.problems and {"organ", "procedure", "diagnoses"} <= set(report.record):
                read += weight(n)
                back += weight(n) * all(returns(text, report.record, x) for x in ("biopsy", "lines", "json"))
        assert read / total >= 0.98 and back / total >= 0.95


def test_a_second_specimen_has_no_place():
    report = parse_report("A. Breast, left, biopsy;\n Fibroadenoma\nB. Breast, right, biopsy;\n Carcinoma", BIOPSY)
    assert len(report.unknown) == 1 and [d["diagnosis"] for d in report.record["diagnoses"]] == ["fibroadenoma"]


@pytest.mark.parametrize(
    "text", ["Lung, biopsy;\n - Adenocarcinoma", "Lung, biopsy: Adenocarcinoma", "Lung, biopsy\n  Adenocarcnoma"]
)
def test_other_layouts_of_one_diagnosis(text):
    record = parse_report(text, BIOPSY).record
    assert record == {"organ": "lung", "procedure": "biopsy", "diagnoses": [{"diagnosis": "adenocarcinoma"}]}


def test_a_skipped_number_starts_a_diagnosis():
    record = parse_report("Stomach, biopsy;\n 1. Chronic gastritis\n 3. Polyp", BIOPSY).record
    assert [d["diagnosis"] for d in record["diagnoses"]] == ["chronic gastritis", "polyp"]
