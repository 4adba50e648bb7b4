"""The protocols that ship: they load, their reports survive a round trip, and their rules derive what staging says."""

import re
import textwrap
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.check import check_record, derive
from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol, protocol_names
from frugalpath.rewards.synoptic.render import render_report
from frugalpath.rewards.synoptic.score import score_case
from frugalpath.rewards.synoptic.values import Unreadable, read_value
from frugalpath.rewards.synoptic.vocabulary import protocol_vocabulary

RESECTIONS = (
    "breast_resection",
    "prostatectomy",
    "colorectal_resection",
    "lung_resection",
    "lung_resection_ajcc8",
)
SHIPPED = (*RESECTIONS, "diagnosis_certainty", "biopsy", "simulator")


def values_of(field):
    """Values that the field can have."""
    if field.type == "multi":
        alone = {UNDETERMINED, "not identified", "none known"}
        several = st.sets(st.sampled_from([v for v in field.values if v not in alone]), min_size=1, max_size=4)
        single = st.sampled_from([[v] for v in field.values if v in alone] or [[UNDETERMINED]])
        return several.map(lambda found: sorted(found, key=field.rank.__getitem__)) | single
    if field.values:
        return st.sampled_from(sorted({*field.values, UNDETERMINED}))
    if field.type == "integer":
        return st.integers(0, 200) | st.just(UNDETERMINED)
    if field.type == "number":
        return st.integers(0, 5000).map(lambda n: n / 10 if n % 10 else n // 10) | st.sampled_from(["< 1", "> 90"])
    if field.type == "text":
        return st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=60).filter(
            lambda text: text == " ".join(text.split()) and normalise(text) and read_value(field, text) == text
        )
    return st.lists(entry_of(field), min_size=1, max_size=3, unique_by=lambda e: tuple(map(str, e.values())))


def entry_of(field):
    needed = {f.id: values_of(f) for f in field.fields if f.id in field.key}
    return st.fixed_dictionaries(needed, optional={f.id: values_of(f) for f in field.fields if f.id not in needed})


@st.composite
def records(draw, protocol):
    """A valid value, or "not applicable", for fields that apply; at least one of them has a value."""
    record = {f.id: draw(values_of(f)) for f in protocol.fields if f.requirement != "optional" or draw(st.booleans())}
    while gone := [f.id for f in protocol.fields if f.id in record and not f.applies(record)]:
        for name in gone:
            del record[name]
    for name in draw(st.sets(st.sampled_from(sorted(record)), max_size=len(record) - 1)):
        record[name] = draw(st.sampled_from([None, record[name]]))
    return record


def test_what_ships_is_listed():
    assert protocol_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_protocol_cites_its_source(name):
    protocol = load_protocol(name)
    assert "Not a CAP product" in protocol.source or name == "simulator"
    if name in RESECTIONS:
        assert "CAP" in protocol.source and "AJCC" in protocol.source
        critical = {field.id for field in protocol.fields if field.critical}
        assert {"histologic_type", "margin_status", "pt", "pn"} <= critical
        assert critical & {"grade", "nottingham_grade", "grade_group"}
        seen = {field.id for field in protocol.fields if field.inferable}
        assert "histologic_type" in seen
        assert not seen & {"procedure", "laterality", "tumor_size", "nodes_examined", "margin_distance", "pt", "pn"}
        for field in (protocol.by_id["pn"], protocol.by_id["margin_status"]):
            grouped = [word for words in field.groups.values() for word in words]
            assert sorted(grouped) == sorted(normalise(v) for v in field.values if v != UNDETERMINED)


@pytest.mark.parametrize("layout", ["lines", "json"])
@pytest.mark.parametrize("name", SHIPPED)
def test_reports_survive_a_round_trip_and_score_one(name, layout):
    protocol = load_protocol(name)

    @given(record=records(protocol), headings=st.booleans())
    def check(record, headings):
        report = parse_report(render_report(record, protocol, layout, headings), protocol)
        assert (report.record, report.problems) == (record, [])
        if any(value is not None for value in record.values()):
            score = score_case(record, report, protocol)
            assert (score.case_score, score.hallucinated, score.critical_errors) == (1.0, (), ())

    check()


@pytest.mark.parametrize("name", SHIPPED)
def test_every_word_of_a_value_is_read_as_that_value(name):
    protocol = load_protocol(name)
    for field in protocol.fields:
        for each in (field, *field.fields):
            for value, synonyms in each.values.items():
                for word in (value, *synonyms, value.upper(), f" {value}. "):
                    assert read_value(each, word) == ([value] if each.type == "multi" else value), (each.id, word)


@pytest.mark.parametrize("name", SHIPPED)
def test_any_two_values_of_a_multi_field_are_read_as_the_two(name):
    for field in load_protocol(name).fields:
        alone = {UNDETERMINED, "not identified", "none known"}
        for pair in combinations([v for v in field.values if field.type == "multi" and v not in alone], 2):
            assert read_value(field, ", ".join(pair)) == read_value(field, " and ".join(pair[::-1])) == list(pair)


@pytest.mark.parametrize("name", RESECTIONS)
def test_stages_are_read_with_their_prefixes(name):
    protocol = load_protocol(name)
    for stage in ("pt", "pn"):
        field = protocol.by_id[stage]
        for value in field.values:
            if value != UNDETERMINED:
                assert {read_value(field, text) for text in (value, f"p{value}", f"yp{value}")} == {value}
        letter = stage[1]
        assert {read_value(field, text) for text in (f"{letter}X", f"p{letter}X", f"yp{letter}X")} == {UNDETERMINED}


def derived(name, field, **record):
    return derive(record, load_protocol(name)).get(field)


def agrees(name, **record):
    """Whether the protocol finds nothing in which the fields disagree."""
    return not [p for p in check_record(record, load_protocol(name)) if "does not agree" in p]


@pytest.mark.parametrize("tubule", (1, 2, 3))
@pytest.mark.parametrize("nuclear", (1, 2, 3))
@pytest.mark.parametrize("mitotic", (1, 2, 3))
def test_the_nottingham_grade_follows_from_the_scores(tubule, nuclear, mitotic):
    scores = {"tubule_score": str(tubule), "nuclear_score": str(nuclear), "mitotic_score": str(mitotic)}
    total = tubule + nuclear + mitotic
    grade = "1" if total <= 5 else "2" if total <= 7 else "3"
    found = derive(scores, load_protocol("breast_resection"))
    assert (found["nottingham_total"], found["nottingham_grade"]) == (total, grade)
    assert derived("breast_resection", "nottingham_grade", nottingham_total=total) == grade


def test_three_and_three_and_two_is_grade_three():
    found = derived("breast_resection", "nottingham_grade", tubule_score="3", nuclear_score="3", mitotic_score="2")
    assert found == "3"


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        (0.5, "T1mi"), (1, "T1mi"), (1.1, "T1a"), (5, "T1a"), (5.1, "T1b"), (10, "T1b"), (10.1, "T1c"), (20, "T1c"),
        (20.1, "T2"), (50, "T2"), (50.1, "T3"), (200, "T3"),
    ],
)  # fmt: skip
def test_breast_pt_follows_from_size(size, stage):
    plain = {"tumor_extent": ["not identified"], "tumor_size": size}
    assert derived("breast_resection", "pt", **plain) == stage
    assert not agrees("breast_resection", **plain, pt="T4b")
    # Without the extent a T4 of any size agrees, and nothing is derived.
    assert derived("breast_resection", "pt", tumor_size=size) is None
    for agreeing in (stage, "T4a", "T4b", "T4c", "T4d"):
        assert agrees("breast_resection", tumor_size=size, pt=agreeing)
    for other in {"T1mi", "T1a", "T1b", "T1c", "T2", "T3"} - {stage}:
        assert not agrees("breast_resection", tumor_size=size, pt=other)


@pytest.mark.parametrize(
    ("extent", "stages"),
    [("chest wall", {"T4a", "T4c"}), ("skin ulceration", {"T4b", "T4c"}), ("inflammatory carcinoma", {"T4d"})],
)
def test_breast_pt4_follows_from_extent(extent, stages):
    record = {"tumor_size": 12, "tumor_extent": [extent]}
    every = load_protocol("breast_resection").by_id["pt"].rank
    assert {stage for stage in every if agrees("breast_resection", **record, pt=stage)} == stages


@pytest.mark.parametrize(
    ("macro", "micro", "stage"),
    [(0, 1, "N1mi"), (0, 5, "N1mi"), (1, 0, "N1a"), (1, 2, "N1a"), (3, 1, "N2a"), (9, 0, "N2a"), (9, 1, "N3a")],
)
def test_breast_pn_follows_from_counts(macro, micro, stage):
    counts = {"node_status": "tumor present", "nodes_macro": macro, "nodes_micro": micro}
    found = derive({**counts, "positive_node_sites": ["axillary"]}, load_protocol("breast_resection"))
    assert (found["nodes_positive"], found["pn"]) == (macro + micro, stage)
    assert agrees("breast_resection", **counts, nodes_positive=macro + micro, pn=stage)
    assert not agrees("breast_resection", **counts, nodes_positive=macro + micro, pn="N0")


def test_breast_pn_of_negative_nodes_and_receptors():
    assert derived("breast_resection", "pn", node_status="all negative") == "N0"
    assert derived("breast_resection", "pn", node_status="isolated tumor cells only") == "N0(i+)"
    assert derived("breast_resection", "pn", node_status="none submitted") == UNDETERMINED
    statuses = [derived("breast_resection", "er", er_percent=p) for p in (0, 0.9, 1, 10, 10.5, 100)]
    assert statuses == ["negative", "negative", "low positive", "low positive", "positive", "positive"]
    assert [derived("breast_resection", "pr", pr_percent=p) for p in (0, 1)] == ["negative", "positive"]


@pytest.mark.parametrize(
    ("patterns", "group"),
    list(zip(("33", "34", "43", "44", "35", "53", "45", "54", "55"), "123444555", strict=True)),
)
def test_the_grade_group_follows_from_the_patterns(patterns, group):
    primary, secondary = patterns
    record = {"primary_pattern": primary, "secondary_pattern": secondary}
    found = derive(record, load_protocol("prostatectomy"))
    assert (found["gleason_score"], found["grade_group"]) == (int(primary) + int(secondary), group)
    assert read_value(load_protocol("prostatectomy").by_id["grade_group"], f"{primary}+{secondary}") == group
    wrong = "1" if group != "1" else "2"
    assert not agrees("prostatectomy", **record, grade_group=wrong)


@pytest.mark.parametrize(
    ("epe", "neck", "svi", "stage"),
    [
        ("not identified", "not identified", "not identified", "T2"),
        ("focal", "not identified", "not identified", "T3a"),
        ("non-focal", "not identified", "no seminal vesicle", "T3a"),
        ("not identified", "present", "not identified", "T3a"),
        ("focal", "present", "left", "T3b"),
        ("not identified", "not identified", "bilateral", "T3b"),
        ("focal", "not identified", UNDETERMINED, None),
    ],
)
def test_prostate_pt_follows_from_extension(epe, neck, svi, stage):
    record = {"extraprostatic_extension": epe, "bladder_neck_invasion": neck, "seminal_vesicle_invasion": svi}
    assert derived("prostatectomy", "pt", **record) == stage
    assert derived("prostatectomy", "pt", **record, adjacent_invasion="present") == "T4"


def test_prostate_pn_follows_from_nodes():
    assert derived("prostatectomy", "pn", node_status="tumor present", nodes_positive=1) == "N1"
    assert derived("prostatectomy", "pn", node_status="all negative") == "N0"


@pytest.mark.parametrize(
    ("positive", "deposits", "stage"),
    [
        (0, "not identified", "N0"), (0, "present", "N1c"), (1, "not identified", "N1a"), (1, "present", "N1a"),
        (2, "not identified", "N1b"), (3, "present", "N1b"), (4, "not identified", "N2a"), (6, "present", "N2a"),
        (7, "not identified", "N2b"), (30, "present", "N2b"),
    ],
)  # fmt: skip
def test_colorectal_pn_follows_from_counts_and_deposits(positive, deposits, stage):
    status = "tumor present" if positive else "all negative"
    record = {"node_status": status, "nodes_positive": positive, "tumor_deposits": deposits}
    assert derived("colorectal_resection", "pn", **record) == stage
    assert not agrees("colorectal_resection", **record, pn="N0" if stage != "N0" else "N1a")


def test_colorectal_pn_without_an_answer_on_deposits():
    record = {"node_status": "all negative", "nodes_positive": 0}
    assert derived("colorectal_resection", "pn", **record) is None
    assert [agrees("colorectal_resection", **record, pn=stage) for stage in ("N0", "N1c", "N1a")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("extent", "stage"),
    [
        ("no tumor", "T0"), ("mucosa", "Tis"), ("submucosa", "T1"), ("muscularis propria", "T2"),
        ("pericolorectal tissue", "T3"), ("visceral peritoneum", "T4a"), ("adjacent organs", "T4b"),
    ],
)  # fmt: skip
def test_colorectal_pt_follows_from_extent(extent, stage):
    assert derived("colorectal_resection", "pt", extent=extent) == stage


def test_a_depth_of_submucosal_invasion_is_of_pt1_alone():
    protocol = load_protocol("colorectal_resection")
    record = {"extent": "muscularis propria", "submucosal_depth": "less than 1 mm", "pt": "T2"}
    assert check_record(record, protocol) == [
        "Depth of submucosal invasion: answered with 'less than 1 mm', but it does not apply to this case"
    ]
    assert derive({"submucosal_depth": "1-2 mm", "pt": "T1"}, protocol)["pt"] == "T1"


def test_mismatch_repair_follows_from_the_stains():
    stains = dict.fromkeys(("mlh1", "msh2", "msh6", "pms2"), "intact")
    assert derived("colorectal_resection", "mmr_status", **stains) == "proficient"
    for stain in stains:
        assert derived("colorectal_resection", "mmr_status", **{**stains, stain: "lost"}) == "deficient"
        assert derived("colorectal_resection", "mmr_status", **{s: v for s, v in stains.items() if s != stain}) is None


LUNGS = ("lung_resection", "lung_resection_ajcc8")


@pytest.mark.parametrize("name", LUNGS)
@pytest.mark.parametrize(
    ("size", "stage"),
    [
        (0.6, "T1a"), (1, "T1a"), (1.1, "T1b"), (2, "T1b"), (2.1, "T1c"), (3, "T1c"), (3.1, "T2a"), (4, "T2a"),
        (4.1, "T2b"), (5, "T2b"), (5.1, "T3"), (7, "T3"), (7.1, "T4"),
    ],
)  # fmt: skip
def test_lung_pt_follows_from_size(name, size, stage):
    plain = {
        "focality": "single",
        "visceral_pleura": "not identified",
        "direct_invasion": "not identified",
        "invasive_size": size,
    }
    assert derived(name, "pt", **plain) == stage
    assert agrees(name, invasive_size=size, pt=stage) and agrees(name, invasive_size=size, pt="T4")
    lower = {"T1a", "T1b", "T1c", "T2a", "T2b", "T3"} - {stage, "T2a", "T3"}
    assert not any(agrees(name, invasive_size=size, pt=other) for other in lower)


def test_lung_pt_follows_from_invasion_type_and_nodules():
    name = "lung_resection"
    assert derived(name, "pt", focality="separate nodules in another ipsilateral lobe") == "T4"
    assert derived(name, "pt", direct_invasion="present", invaded_structures=["carina"], invasive_size=2) == "T4"
    assert derived(name, "pt", histologic_type="adenocarcinoma in situ, mucinous") == "Tis"
    assert derived(name, "pt", histologic_type="minimally invasive adenocarcinoma, non-mucinous") == "T1mi"
    chest = {"direct_invasion": "present", "invaded_structures": ["chest wall"], "invasive_size": 2}
    assert [agrees(name, **chest, pt=stage) for stage in ("T1b", "T2a", "T3", "T4")] == [False, False, True, True]
    pleura = {"visceral_pleura": "present", "invasive_size": 2}
    assert [agrees(name, **pleura, pt=stage) for stage in ("T1b", "T2a", "T3")] == [False, True, True]


@pytest.mark.parametrize(
    ("side", "stations", "nodes", "ninth", "eighth"),
    [
        ("right", ["11R"], 1, "N1", "N1"),
        ("right", ["7"], 1, "N2a", "N2"),
        ("right", ["4R", "7", "11R"], 4, None, "N2"),
        ("right", ["4L", "4R"], 2, "N3", "N3"),
        ("left", ["5"], 1, "N2a", "N2"),
        ("left", ["4R"], 1, "N3", "N3"),
        ("left", ["1L"], 1, "N3", "N3"),
        ("left", ["12L", "13L"], 2, "N1", "N1"),
    ],
)
def test_lung_pn_follows_from_stations(side, stations, nodes, ninth, eighth):
    record = {
        "laterality": side,
        "node_status": "tumor present",
        "nodes_positive": nodes,
        "positive_stations": stations,
    }
    assert [derived(name, "pn", **record) for name in LUNGS] == [ninth, eighth]


def test_the_two_editions_of_lung_differ_in_pn_and_pm_alone():
    ninth, eighth = map(load_protocol, LUNGS)
    assert list(ninth.by_id) == list(eighth.by_id)
    differ = [name for name in ninth.by_id if ninth.by_id[name].values != eighth.by_id[name].values]
    assert differ == ["pn", "pm"]
    assert read_value(eighth.by_id["pn"], "pN2") == "N2"
    with pytest.raises(Unreadable, match="pN: 'pN2' is not one of"):
        read_value(ninth.by_id["pn"], "pN2")


def test_certainty_and_critical_groups_of_a_case_summary():
    protocol = load_protocol("diagnosis_certainty")
    gold = parse_report("Diagnosis: Invasive lobular carcinoma\nCertainty: definite\nConclusion: Grade 2", protocol)
    assert gold.record["certainty"] == "confirmed"
    other = parse_report("Diagnosis: Benign nevus\nCertainty: suspicious\nConclusion: Grade 2", protocol)
    score = score_case(gold.record, other, protocol)
    assert score.critical_errors == ("diagnosis",)
    assert score.cells["certainty"].predicted == "suspected"


def test_validator_messages_can_be_read():
    protocol = load_protocol("breast_resection")
    record = {
        "tubule_score": "3", "nuclear_score": "3", "mitotic_score": "2", "nottingham_grade": "2",
        "dcis": "not identified", "dcis_size": 12, "margin_status": "near", "tumor_size": 12, "pt": "T2",
        "stage": "II",
    }  # fmt: skip
    assert check_record(record, protocol) == [
        "'stage' is not a field of Breast resection, invasive carcinoma",
        "Overall grade: '2' does not agree with the other fields, which give 3",
        "DCIS extent: answered with 12, but it does not apply to this case",
        "Margin status: 'near' is not one of all negative, involved",
        "pT: 'T2' does not agree with the other fields, which give T1c or T4a or T4b or T4c or T4d",
    ]
    missing = check_record({"dcis": "present"}, protocol, complete=True)
    assert "DCIS nuclear grade: not answered; it is required here" in missing
    assert not [problem for problem in missing if "HER2 by in situ" in problem]


def test_words_of_several_meanings_stand_for_themselves_in_the_vocabulary():
    found = protocol_vocabulary()
    assert (
        found["negative"] == "negative"
        and found["invasive ductal carcinoma"] == "invasive carcinoma of no special type"
    )


HEAD = "title: t\nversion: '1'\nsource: s\n"
FIELD = "fields:\n  - {id: a, name: A, type: categorical, values: {x: [y], z: []}%s}\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (HEAD + "colour: red\n" + FIELD % "", "unknown key 'colour'"),
        (HEAD + FIELD % ", size: 3", "field 'a': unknown key 'size'"),
        (HEAD + FIELD % ", applies_if: {b: x}", "field 'a' looks at 'b', which is not a field"),
        (HEAD + FIELD % ", applies_if: {a: w}", "field 'a' names 'w', which is not a value of 'a'"),
        (HEAD + FIELD % ", derive: [{value: w}]", "field 'a' names 'w', which is not a value of 'a'"),
        (HEAD + FIELD % ", groups: {g: [w]}", "field 'a' names 'w', which is not a value of 'a'"),
        (HEAD + FIELD % ", groups: {g: x}", "field 'a': `groups` must be a mapping of lists"),
        (HEAD + FIELD % ", aliases: b", "field 'a': `aliases` must be a list, not 'b'"),
        (HEAD + FIELD % ", weight: much", "field 'a': `weight` must be a number"),
        (HEAD + FIELD % ", class: conditional", "field 'a': a conditional field needs `applies_if`"),
        (
            HEAD + "fields:\n  - {id: a, type: categorical, values: {x: [y], z: [Y]}}",
            "'Y' stands for both 'x' and 'z'",
        ),
        (HEAD + "fields:\n  - {id: a, type: categorical, values: [yes, no]}", "field 'a': `values` holds a yes/no"),
        (HEAD + "fields:\n  - {id: a, type: categorical, values: {x: [yes]}}", "field 'a': `values` holds a yes/no"),
        (HEAD + "fields:\n  - {id: a, type: categorical, values: {x: y}}", "field 'a': the synonyms of a value must"),
        (HEAD + "fields:\n  - {id: a, type: text}\n  - {id: a, name: B, type: text}", "field 'a' stands twice"),
        (
            HEAD + "fields:\n  - {id: a, type: text}\n  - {id: b, name: A, type: text}",
            "'a' and 'b' are both called 'a'",
        ),
        (HEAD + "extends: own\n" + FIELD % "", "`extends` names 'own'"),
        (HEAD + "extends: other\n", "`extends` names 'own'"),
        (HEAD + "fields: [a, b]\n", "`fields` must be a list of mappings"),
        ("fields: [", "not readable as YAML"),
    ],
)
def test_a_bad_file_gives_one_error_that_names_file_and_field(tmp_path, text, named):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text(HEAD + "extends: own\n" + FIELD % "")
    with pytest.raises(InputError) as caught:
        load_protocol(path)
    assert named in str(caught.value)
    assert ("other.yaml" if "other" in text else "own.yaml") in str(caught.value)


def test_several_problems_of_a_file_are_told_together(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        textwrap.dedent("""
        title: t
        fields:
          - {id: a, type: colour}
          - {id: b, type: number, unit: furlong}
        """)
    )
    with pytest.raises(InputError) as caught:
        load_protocol(path)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "own.yaml: `version` is missing",
        "own.yaml: `source` is missing",
        "own.yaml: field 'a': `type` is 'colour'",
        "own.yaml: field 'b': `unit` is 'furlong'",
    ]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'prostatectomy'"):
        load_protocol("prostatectomie")


DOCS = (Path(__file__).parents[3] / "docs" / "protocols.md").read_text()


def test_the_examples_of_the_docs_hold(tmp_path, capsys):
    path = tmp_path / "skin.yaml"
    path.write_text(re.findall(r"<!-- example: protocol -->\n```yaml\n(.*?)```", DOCS, re.DOTALL)[0])
    assert derive({"diagnosis": "melanoma", "breslow": 1.2}, load_protocol(path))["pt"] == "T2"
    exec(re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0], {})
    said = ["Grade group: '2' does not agree with the other fields, which give 3"]
    assert capsys.readouterr().out == f"{said}\n3\n"
    report = parse_report(
        re.findall(r"```\n(Histologic.*?)```", DOCS, re.DOTALL)[0], load_protocol("breast_resection")
    )
    assert (report.record["tumor_size"], report.record["pt"], report.problems) == (23, "T2", [])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_docs_count_the_fields(name):
    assert f"| `{name}` | {len(load_protocol(name).fields)} |" in DOCS
