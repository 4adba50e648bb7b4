"""Write the report of a run: summary.json, cases.jsonl and pareto.png."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("agg")
from accelerate import PartialState
from matplotlib import pyplot as plt

from envs.case import Case
from rl.checkpoints import is_done
from rl.fields import print_fields
from rl.prepare import cases_of
from slides.whole import whole, write_text

if TYPE_CHECKING:
    from rl.pareto import Evaluation
    from rl.stages import Stages

GAINS = (
    "gain_over_sft", "gain_over_sft_continued", "gain_over_random", "gain_over_text_only", "gain_over_majority",
    "accuracy_lost",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "openslide-python")


def write_report(stages: Stages, evaluation: Evaluation) -> dict[str, Any]:
    """Write `report/` of the run's folder and return the summary."""
    joint = is_done(stages.run.folder / "grpo", stages.grpo_parts()) or {}
    summary = {
        **evaluation.summary(),
        "warnings": joint.get("warnings", []),
        "missing_slides": missing_slides(stages.cases, stages.bank.missing),
        "price_unit": "score per cost of the largest budget",
        "ladder": stages.run.ladder,
        "splits": {s: len(members) for s, members in stages.splits.items()},
        "seed": stages.run.grpo.seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git": _revision(),
        "command": _command(),
    }
    if PartialState().is_main_process:
        folder = stages.run.folder / "report"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_text(folder / "cases.jsonl", _cases(evaluation, summary["headline"]["price"]))
        plot(summary, folder / "pareto.png")
    return summary


def missing_slides(cases: Sequence[Case], missing: Mapping[str, str]) -> list[dict[str, Any]]:
    """Slides that gave no features: `slide`, `reason`, and the number of `cases` that went on without it."""
    count = cases_of(cases, missing)
    return [{"slide": slide, "reason": reason, "cases": count[slide]} for slide, reason in missing.items()]


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


def plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy against cost: static budgets, allocator, random allocator, oracle, text only, majority answer."""
    largest = summary["static"][-1]["flops"]
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")

    def draw(points: list[dict], label: str, **style: Any) -> None:
        points = sorted(points, key=lambda p: p["flops"])
        x = [p["flops"] / largest for p in points]
        y = [p["accuracy"] for p in points]
        error = [[p["accuracy"] - p["ci95"][0] for p in points], [p["ci95"][1] - p["accuracy"] for p in points]]
        axes.errorbar(x, y, yerr=error, label=label, capsize=2, elinewidth=0.7, **style)

    draw(summary["random"], "random, same mean budget", color="0.6", marker="x", linestyle=":")
    draw(summary["static"], "static budgets", color="tab:blue", marker="s", linestyle="--")
    draw(summary["allocator"], "allocator over λ", color="tab:red", marker="o")
    draw([summary["oracle"]], "oracle", color="tab:green", marker="*", linestyle="none", markersize=11)
    for p in summary["static"]:
        axes.annotate(
            str(p["budget"]),
            (p["flops"] / largest, p["accuracy"]),
            xytext=(4, -11),
            textcoords="offset points",
            fontsize=8,
        )
    own = summary["operating_point"]
    axes.scatter([own["flops"] / largest], [own["accuracy"]], s=150, facecolors="none", edgecolors="tab:red", zorder=5)
    axes.axhline(summary["text_only"]["accuracy"], color="0.4", linewidth=0.8, linestyle="-.", label="text only")
    axes.axhline(summary["majority"]["accuracy"], color="0.75", linewidth=0.8, label="majority answer")
    axes.set_xscale("log")
    axes.set_xlabel("cost of an answer (FLOPs, largest budget = 1, allocator's look counted)")
    axes.set_ylabel(f"accuracy (n = {summary['n']}, 95 % interval)")
    axes.legend(fontsize=8, loc="lower right")
    with whole(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def _cases(evaluation: Evaluation, price: float) -> str:
    test = evaluation.test
    rungs = evaluation.rungs(evaluation.values, price)
    flops = test.flops
    lines = []
    for i, case in enumerate(evaluation.stages.splits["test"]):
        k = test.budgets.index(evaluation.ladder[rungs[i]])
        lines.append(
            json.dumps(
                {
                    "id": case.id,
                    "patient": case.patient,
                    "question": case.question,
                    "answer": case.answer,
                    "budget": test.budgets[k],
                    "completion": test.text[i][k],
                    "score": float(test.score[i, k]),
                    "tokens": int(test.visual[i, k]),
                    "prompt_tokens": int(test.prompt[i, k]),
                    "generated_tokens": int(test.generated[i, k]),
                    "flops": float(flops[i, k]) + float(evaluation.stage1[i]),
                    "score_by_budget": {str(b): float(test.score[i, j]) for j, b in enumerate(test.budgets)},
                    "predicted": {
                        str(b): round(float(v), 4)
                        for b, v in zip(evaluation.ladder, evaluation.values[i], strict=True)
                    },
                }
            )
        )
    return "\n".join(lines) + "\n"


def _revision() -> str | None:
    """Revision of the sources, with a mark when they were changed since; None outside a git checkout."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    processes = PartialState().num_processes
    return f"accelerate launch --num_processes {processes} {' '.join(sys.argv)}"
