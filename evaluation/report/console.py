"""Print a summary of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frugalpath.evaluation.metrics import print_fields
from frugalpath.evaluation.report.tables import of_patients, unit

GAINS = (
    "gain_over_sft", "gain_over_sft_continued", "gain_over_random", "gain_over_text_only", "gain_over_majority",
    "accuracy_lost", "accuracy_lost_vs_best", "gain_at_equal_cost", "area_over_static",
)  # fmt: skip


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print the summary of a run."""
    _table(summary)
    print("attribution: " + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in summary["attribution"].items()))
    _headline(summary)
    for question, row in (summary["linear_probe"] or {}).items():
        values = ", ".join(f"{k} {row[k]['value']:.3f}" for k in ("linear_probe", "best_static", "allocator"))
        print(f"balanced accuracy, {question} (n={row['n']}): {values}")
    print_fields(summary["synoptic"])
    _notes(summary, folder)


def print_outcome(summary: dict[str, Any], folder: Path) -> None:
    """Print the summary of a run applied to the cases of another recipe."""
    _table(summary)
    _headline(summary)
    _notes(summary, folder)


def _table(summary: dict[str, Any]) -> None:
    head, n = summary["headline"], summary["n"]
    print(f"\n{n} test cases {of_patients(summary)}; 95 % intervals by {unit(summary)}")
    print(f"{'':26s}{'accuracy':>9s}  {'95 % interval':15s}{'tokens':>8s}{'cost':>8s}")
    largest = summary["static"][-1]["flops"]
    rows = [(f"static {p['budget']}", p) for p in summary["static"]]
    rows += [(f"allocator λ={head['price']:g}", summary["operating_point"])]
    rows += [("random, same mean budget", summary["operating_random"]), ("oracle", summary["oracle"])]
    rows += [("text only", summary["text_only"]), ("majority answer", summary["majority"])]
    for name, p in rows:
        low, high = p["ci95"]
        print(f"{name:26s}{p['accuracy']:9.3f}  [{low:.3f}, {high:.3f}] {p['tokens']:7.1f}{p['flops'] / largest:8.3f}")
    print("cost: FLOPs including the decision, largest budget = 1; the random allocator pays for no probe")


def _headline(summary: dict[str, Any]) -> None:
    head, found = summary["headline"], summary["frontier"]["operating"]["flops"]
    for name in GAINS:
        if name in head:
            print(f"{name}: {_figure(head[name])}")
    print(
        f"cost: {_figure(head['cost_share'], '.1%')} of the largest budget's, {found['stage1_share']:.1%} of it for "
        "the decision"
    )
    for name, text in (("step", "the cheapest static budget"), ("mixed", "static budgets mixed at random")):
        equal = found["equal_accuracy"][name]
        share = _figure(equal["cost_share"], ".1%") if equal["cost"] is not None else "not reached by any"
        print(f"cost relative to {text} of equal accuracy: {share}")
    spent, told = summary["calibration"]["spend"], summary["information"]
    print(f"rank correlation of spend with gain: {_figure(spent['rank_correlation'])}")
    scores = summary["calibration"]["scores"]
    if scores is not None:
        row = scores["all"]
        skill = (
            "" if row["brier_skill"] is None else f", skill over the question's base rate {row['brier_skill']:+.1%}"
        )
        print(f"predicted scores: calibration error {row['ece']:.3f}, Brier {row['brier']:.3f}{skill}")
    parts = [
        f"{name.replace('_', ' ')} {row['bits']:.3f} (chance {row['chance']:.3f}, p {row['p']:.3f})"
        for name in ("question", "image_given_question")
        if (row := told[name])
    ]
    print(f"mutual information of the budget (entropy {told['entropy']:.3f} bits) with {', '.join(parts)}")
    times = summary["latency"]
    answers = ", ".join(f"{b}: {t['median_ms']:.1f}" for b, t in times["answer"].items())
    print(f"median ms per answer by budget {answers}; per decision {times['look']['median_ms']:.1f}")


def _notes(summary: dict[str, Any], folder: Path) -> None:
    for lost in summary["missing_slides"]:
        print(f"missing in {lost['cases']} cases: {lost['slide']}: {lost['reason']}")
    for warning in summary.get("warnings", ()):
        print(f"warning: {warning}")
    print(f"report: {folder}")


def _figure(figure: dict[str, Any], form: str = "+.3f") -> str:
    """Format a value with its interval."""
    if figure["value"] is None:
        return "undefined"
    low, high = figure["ci95"]
    return f"{figure['value']:{form}} [{low:{form}}, {high:{form}}]"
