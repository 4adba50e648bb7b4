"""Credit of fields and lists, critical errors, coverage and agreement."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from frugalpath.rewards.synoptic.corpus import corpus_report
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.report import Report
from frugalpath.rewards.synoptic.score import credit_of, score_case
from frugalpath.rewards.synoptic.similarity import similarity

SIMULATOR, BIOPSY = load_protocol("simulator"), load_protocol("biopsy")
BREAST = load_protocol("breast_resection")
ENTRIES = [
    {"diagnosis": "invasive carcinoma of no special type", "grade": "2"},
    {"diagnosis": "ductal carcinoma in situ", "nuclear_grade": "high"},
    {"diagnosis": "fibroadenoma"},
]


def case(gold, text):
    return score_case(parse_report(gold, SIMULATOR).record, parse_report(text, SIMULATOR), SIMULATOR)


def listed(gold, entries):
    return score_case({"diagnoses": gold}, Report({"diagnoses": entries}), BIOPSY)


def test_entries_are_matched_for_the_greatest_total():
    # The first gold entry is nearest to the first of the report; so is the second, which has no other.
    gold = [
        {"diagnosis": "tubular adenoma", "tier": "low", "certainty": "probably"},
        {"diagnosis": "tubular adenoma", "tier": "low"},
    ]
    said = [{"diagnosis": "tubular adenoma", "tier": "low"}, {"diagnosis": "tubular adenoma", "certainty": "probably"}]
    alone = [[listed([g], [s]).case_score for s in said] for g in gold]
    greedy = alone[0][0] + alone[1][1]
    assert alone[0][0] >= alone[0][1]  # what a greedy match of the first gold entry would take
    best = max(greedy, alone[0][1] + alone[1][0])
    assert best > greedy
    assert listed(gold, said).case_score == pytest.approx(2 * best / 4)


@given(st.permutations(ENTRIES), st.permutations([*ENTRIES[:2], {"diagnosis": "duct ectasia"}]))
def test_the_order_of_a_list_does_not_matter(gold, said):
    assert listed(gold, gold[::-1]).case_score == 1.0
    usual = listed(ENTRIES, [*ENTRIES[:2], {"diagnosis": "duct ectasia"}])
    assert listed(gold, said).case_score == pytest.approx(usual.case_score) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("said", "score"), [(ENTRIES[:1], 0.5), (ENTRIES * 2, 2 / 3), ([], 0.0), (None, 0.0)])
def test_entries_that_lack_or_are_too_many_cost(said, score):
    assert listed(ENTRIES, said).case_score == pytest.approx(score)


def test_long_lists_are_matched_in_little_time():
    times = []
    for attempt in range(3):
        gold = [{"diagnosis": f"invasive carcinoma of kind {attempt} {chr(97 + i % 26)}{i}"} for i in range(50)]
        start = time.process_time()
        assert listed(gold, gold[::-1]).case_score == 1.0
        times.append(time.process_time() - start)
    assert min(times) < 0.05


@pytest.mark.parametrize(
    ("gold", "said", "credit"),
    [
        (["skin ulceration"], ["skin ulceration", "chest wall"], 1 / 2),
        (["skin ulceration", "chest wall"], ["chest wall", "skin ulceration"], 1.0),
        (["skin ulceration"], ["chest wall"], 0.0),
        (["skin ulceration"], ["cannot be determined"], 0.0),
        (["skin ulceration"], None, 0.0),
    ],
)
def test_several_values_are_credited_by_their_overlap(gold, said, credit):
    assert credit_of(BREAST.by_id["tumor_extent"], gold, said) == pytest.approx(credit)


@pytest.mark.parametrize(
    ("gold", "said", "credit"),
    [("1", "1", 1), ("1", "2", 2 / 3), ("2", "1", 2 / 3), ("1", "4", 0), ("1", None, 0),
     ("1", "cannot be determined", 0), ("cannot be determined", "cannot be determined", 1)],
)  # fmt: skip
def test_a_neighbouring_grade_earns_part(gold, said, credit):
    assert credit_of(BIOPSY.by_id["diagnoses"].inner["grade"], gold, said) == pytest.approx(credit)


@pytest.mark.parametrize(
    ("gold", "said", "credit"),
    [("< 5", "< 5", 1), ("< 5", 5, 0), ("< 5", 4, 0), ("< 5", "<= 5", 0), ("< 5", "> 5", 0), ("< 5", "< 9", 0),
     (100, 110, 1), (100, 110.1, 0), (100, "cannot be determined", 0)],
)  # fmt: skip
def test_a_bound_is_no_number(gold, said, credit):
    assert credit_of(SIMULATOR.by_id["tumour_size_mm"], gold, said) == credit


def test_coverage_and_completeness_count_what_is_attempted():
    gold = "Diagnosis: carcinoma\nGrade: 2\nNecrosis: present\nQuadrant: upper left\nMargin: clear\nTumor size: 9 mm"
    found = case(gold, "Diagnosis: adenoma\nGrade: zzz\nNecrosis: n/a")
    # Wrong, unreadable and "not applicable" answers are attempts; the size is not required.
    assert (found.coverage, found.complete) == (pytest.approx(3 / 6), pytest.approx(3 / 5))
    assert (found.non_null_accuracy, found.critical_right) == (0.0, False)
    assert case(gold, gold).complete == case(gold, gold).coverage == 1.0


def test_what_does_not_apply_is_hallucinated_and_costs_a_field_each():
    said = "Diagnosis: normal\nGrade: 2\nMargin: clear\nNecrosis: n/a\nQuadrant: cannot be determined"
    found = case("Diagnosis: normal", said)
    assert found.hallucinated == ("grade", "margin_status")
    assert (found.case_score, found.penalised(0.25), found.penalised(1.0)) == (1.0, 0.5, 0.0)
    # An optional field that the gold record is silent about may be answered.
    assert case("Diagnosis: carcinoma", "Diagnosis: carcinoma\nTumor size: 9 mm").hallucinated == ()


def test_errors_between_groups_are_critical():
    gold = "Diagnosis: carcinoma\nMargin: involved"
    assert case(gold, "Diagnosis: adenoma\nMargin: clear").critical_errors == ("diagnosis", "margin_status")
    assert case(gold, "Diagnosis: cannot be determined").critical_errors == ()
    assert case("Margin: close", "Margin: clear").critical_errors == ()


@pytest.mark.parametrize(
    ("text", "malignant"),
    [
        ("no adenoma but carcinoma", True),
        ("no dysplasia, invasive carcinoma present", True),
        ("carcinoma, no necrosis", True),
        ("carcinoma of no special type", True),
        ("carcinoma, not otherwise specified", True),
        ("non-small cell carcinoma variant", True),
        ("no special type carcinoma, one focus", True),
        ("no adenoma here" + " and other words" * 9 + " carcinoma", True),
        ("negative for carcinoma", False),
        ("negative for dysplasia or carcinoma", False),
        ("adenoma without carcinoma", False),
        ("carcinoma: not identified", False),
        ("carcinoma is absent", False),
        ("no carcinoma but adenoma", False),
        ("non-malignant polyp", False),
    ],
)
def test_a_finding_counts_unless_its_own_clause_denies_it(text, malignant):
    assert listed([{"diagnosis": "adenocarcinoma"}], [{"diagnosis": text}]).critical_errors == (
        () if malignant else ("diagnoses",)
    )
    assert listed([{"diagnosis": "tubular adenoma"}], [{"diagnosis": text}]).critical_errors == (
        ("diagnoses",) if malignant else ()
    )


def test_many_denials_take_little_time():
    start = time.process_time()
    listed(ENTRIES, [{"diagnosis": f"{i} " + "no carcinoma " * 150} for i in range(6)])
    assert time.process_time() - start < 0.05


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
