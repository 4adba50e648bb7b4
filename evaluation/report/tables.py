"""Parts of a summary as tables of the page: `caption`, `head` (column names) and `rows` of texts.

Where the data name no patients, each case counts as one, and the report says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of_patients(summary: Mapping[str, Any]) -> str:
    """Phrase for the number of patients, to follow the number of test cases."""
    lost, number = summary.get("n_without_patient", 0), summary["n_patients"]
    if lost == summary["n"]:
        return "(no patients given: each case counts as one, so intervals may be too narrow)"
    told = f"of {number} patient{'' if number == 1 else 's'}"
    if lost:
        told += f" ({lost} cases without a patient: each counts as one, so intervals may be too narrow)"
    return told


def unit(summary: Mapping[str, Any]) -> str:
    """Unit of the bootstrap and of the splits: case or patient."""
    return "case" if summary.get("n_without_patient", 0) == summary["n"] else "patient"


Table = dict[str, Any]

MEANS = (
    "case_score", "non_null_accuracy", "macro_accuracy", "coverage", "completeness", "critical_right",
    "critical_error_free", "hallucinated", "gain",
)  # fmt: skip
UNITS = {"flops": "FLOPs", "tokens": "visual tokens of the answer", "latency_ms": "milliseconds"}
AREAS = {
    ("mixed", "linear"): "area between the frontiers, mixed budgets, over cost",
    ("mixed", "log"): "area between the frontiers, mixed budgets, over log cost",
    ("step", "linear"): "area between the frontiers, steps, over cost",
    ("step", "log"): "area between the frontiers, steps, over log cost",
    ("hypervolume", "adaptive"): "hypervolume, allocator",
    ("hypervolume", "static"): "hypervolume, static",
    ("hypervolume", "difference"): "hypervolume, difference",
}


def number(value: Any) -> str:
    """Format a value: floats to three decimals or three digits, `—` for None."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ").replace("-", "−")
    if isinstance(value, float):
        size = abs(value)
        text = f"{value:.2g}" if 0 < size < 5e-4 else f"{value:.3f}" if size < 10 else f"{value:.1f}"
        return (f"{value:.3g}" if size >= 1e5 else text).replace("-", "−", 1)
    return str(value)


def interval(value: Any) -> str:
    """Format a 95 % interval."""
    low, high = value
    return f"[{number(float(low))}, {number(float(high))}]"


def label(name: Any) -> str:
    """Turn a key into words."""
    return str(name).replace("_", " ")


def figure(value: Mapping[str, Any] | None) -> str:
    """Format `{value, ci95}` with its interval."""
    if value is None or value["value"] is None:
        return "—"
    return number(float(value["value"])) + (f" {interval(value['ci95'])}" if value.get("ci95") else "")


def measures(summary: Mapping[str, Any]) -> dict[str, list[Table]]:
    """Tables of a summary's frontier, calibration, information and latency, by heading."""
    makers = {
        "frontier": ("Comparison with the static frontier", _frontier),
        "calibration": ("Calibration of predicted scores", _calibration),
        "information": ("What the chosen budget depends on", _information),
        "latency": ("Latency at batch size 1", _latency),
    }
    found = {title: make(summary[key]) for key, (title, make) in makers.items() if summary.get(key)}
    return {title: tables for title, tables in found.items() if tables}


def _frontier(part: Mapping[str, Any]) -> list[Table]:
    rows = [[name, figure(part[a][b])] for (a, b), name in AREAS.items() if a in part and b in part[a]]
    if "chosen_on_val" in part:
        chosen = part["chosen_on_val"]["linear"]
        rows.append(["area between the lines through points chosen on validation cases", figure(chosen)])
    caption = "Mean accuracy above the static frontier over the common cost range, and hypervolumes [95 %]"
    tables = [{"caption": caption, "head": ["measure", "value"], "rows": rows}] if rows else []
    units = []
    for unit, row in part.get("operating", {}).items():
        step, line = row["equal_accuracy"]["step"], row["equal_accuracy"]["mixed"]
        units.append(
            [
                UNITS.get(unit, label(unit)),
                figure(row["cost_share"]),
                number(row["stage1_share"]),
                figure(step["cost_share"]),
                number(step["budget"]),
                figure(line["cost_share"]),
                figure(row["equal_cost"]["gain"]),
            ]
        )
    if units:
        head = ["cost in", "vs largest", "decision", "vs equal static", "its budget", "vs mixed static", "gain"]
        caption = "Cost of the operating point relative to the largest budget, to the cheapest static budget of equal "
        caption += "accuracy and to mixed static budgets of equal accuracy; accuracy gain at equal cost [95 %]"
        tables.append({"caption": caption, "head": head, "rows": units})
    return tables


def _calibration(part: Mapping[str, Any]) -> list[Table]:
    scores = part.get("scores")
    if not scores:
        return []
    named = [*scores["by_budget"].items(), ("all", scores["all"])]
    keys = ("predicted", "observed", "ece", "brier", "brier_skill")
    rows = [[name, *(number(row[key]) for key in keys)] for name, row in named]
    caption = "ECE: expected calibration error; Brier skill: against the mean score of each kind of question"
    head = ["budget", "predicted", "observed", "ECE", "Brier", "Brier skill"]
    return [{"caption": caption, "head": head, "rows": rows}]


def _information(part: Mapping[str, Any]) -> list[Table]:
    kinds = part.get("image_kinds", "?")
    names = {
        "question": "the kind of question",
        "image_given_question": f"the kind of image ({kinds} kind{'' if kinds == 1 else 's'}), given the question",
    }
    keys = ("bits", "chance", "chance95", "p")
    rows = [[name, *(number(part[k][key]) for key in keys)] for k, name in names.items() if k in part]
    caption = f"Mutual information with the budget, whose entropy is {number(part.get('entropy'))} bits"
    if "image_at_most" in part:
        caption += f", of which the image explains at most {number(part['image_at_most'])}"
    return [{"caption": caption, "head": ["with", "bits", "by chance", "chance, 95 %", "p"], "rows": rows}]


def _latency(part: Mapping[str, Any]) -> list[Table]:
    timed = [(f"answer, budget {b}", row) for b, row in part["answer"].items()] + [("decision", part["look"])]
    rows = [[name, f"{row['median_ms']:.2f}", "{:.2f}–{:.2f}".format(*row["quartiles_ms"])] for name, row in timed]
    caption = f"{part['cases']} cases; images are read and encoded in advance"
    return [{"caption": caption, "head": ["", "median ms", "quartiles"], "rows": rows}]


def synoptic_tables(results: Mapping[str, Any], stages: Mapping[str, str]) -> list[Table]:
    """Tables of synoptic reports, by protocol: means of every stage, and fields of the last stage.

    Args:
        results: result of `frugalpath.evaluation.metrics.field_results`.
        stages: labels of the stages.
    """
    found = []
    for protocol, by_stage in results.items():
        means = [name for name in MEANS if any(report.get(name) for report in by_stage.values())]
        rows = [
            [stages.get(stage, stage), number(report["n"]), *(figure(report.get(name)) for name in means)]
            for stage, report in by_stage.items()
        ]
        found.append(
            {"caption": f"Reports: {label(protocol)}", "head": ["stage", "n", *map(label, means)], "rows": rows}
        )
        last, report = list(by_stage.items())[-1]
        fields = [
            [label(name), number(row["n"]), figure({"value": row["accuracy"], "ci95": row.get("ci95")})]
            for name, row in report.get("fields", {}).items()
        ]
        if fields:
            caption = f"Fields of {label(protocol)}, {stages.get(last, last)}"
            found.append({"caption": caption, "head": ["field", "n", "accuracy"], "rows": fields})
    return found
