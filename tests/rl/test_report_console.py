"""What the console tells of a report."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report_page import made_up, summary_of
from rl.report.console import print_outcome


def test_the_random_allocator_is_told_with_what_it_costs(capsys):
    summary = summary_of(made_up(60))
    print_outcome(summary, Path("report"))
    told = capsys.readouterr().out
    (row,) = [line for line in told.splitlines() if line.startswith("random")]
    random, largest = summary["operating_random"]["flops"], summary["static"][-1]["flops"]
    assert row.startswith("random, same mean budget") and row.endswith(f"{random / largest:.3f}")
    assert "same cost" not in told and "pays for no look" in told
