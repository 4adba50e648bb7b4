"""The headline of a report on standard output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl.fields import print_fields

GAINS = (
    "gain_over_sft", "gain_over_sft_continued", "gain_over_random", "gain_over_text_only", "gain_over_majority",
    "accuracy_lost",
)  # fmt: skip


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """The headline on standard output."""
    head, n = summary["headline"], summary["n"]
    print(f"\n{n} test cases of {summary['n_patients']} patients; 95 % intervals by patient")
    print(f"{'':18s}{'accuracy':>9s}  {'95 % interval':15s}{'tokens':>8s}{'cost':>8s}")
    largest = summary["static"][-1]["flops"]
    rows = [(f"static {p['budget']}", p) for p in summary["static"]]
    rows += [(f"allocator λ={head['price']:g}", summary["operating_point"])]
    rows += [("random, same cost", summary["operating_random"]), ("oracle", summary["oracle"])]
    rows += [("text only", summary["text_only"]), ("majority answer", summary["majority"])]
    for name, p in rows:
        low, high = p["ci95"]
        print(f"{name:18s}{p['accuracy']:9.3f}  [{low:.3f}, {high:.3f}] {p['tokens']:7.1f}{p['flops'] / largest:8.3f}")
    print("attribution: " + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in summary["attribution"].items()))
    for name in GAINS:
        if name in head:
            low, high = head[name]["ci95"]
            print(f"{name}: {head[name]['value']:+.3f} [{low:+.3f}, {high:+.3f}]")
    print(f"cost saved against the largest budget: {head['cost_saved']:.1%}; ", end="")
    equal = head["cost_saved_vs_static"]
    print(
        "no static budget is as accurate"
        if equal is None
        else f"against the cheapest equal static budget: {equal:.1%}"
    )
    for question, row in (summary["linear_probe"] or {}).items():
        values = ", ".join(f"{k} {row[k]['value']:.3f}" for k in ("linear_probe", "best_static", "allocator"))
        print(f"balanced accuracy, {question} (n={row['n']}): {values}")
    print_fields(summary["synoptic"])
    for lost in summary["missing_slides"]:
        print(f"left out of {lost['cases']} cases: {lost['slide']}: {lost['reason']}")
    for warning in summary["warnings"]:
        print(f"warning: {warning}")
    print(f"report: {folder}")
