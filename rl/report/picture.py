"""Accuracy against cost as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from slides.whole import whole


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
