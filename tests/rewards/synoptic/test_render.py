"""Open text in entries of lists comes back whatever it holds."""

from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import load_protocol
from frugalpath.rewards.synoptic.render import render_report

BIOPSY = load_protocol("biopsy")
texts = st.text(st.sampled_from('ab ;:"()[]-,\\{}*'), min_size=1, max_size=20).map(lambda t: f"x{t}y")


@given(st.lists(texts, min_size=1, max_size=3), texts, st.sampled_from(["lines", "json"]))
def test_marks_in_the_text_of_entries_come_back(remarks, note, layout):
    entries = [{"diagnosis": "fibroadenoma", "remarks": " ".join(text.split())} for text in remarks]
    record = {"diagnoses": entries, "notes": " ".join(note.split())}
    report = parse_report(render_report(record, BIOPSY, layout), BIOPSY)
    assert (report.record, report.problems) == (record, [])
