"""Figures of a report: interactive ones as plotly dictionaries of data and layout, and a static picture.

The static picture plots accuracy against cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from frugalpath.files import atomic_write

Figure = dict[str, Any]

# Okabe and Ito's colours, which the colour-blind tell apart; every curve has a marker or dash of its own too.
ALLOCATOR, STATIC, RANDOM, ORACLE = "#d55e00", "#0072b2", "#6e7781", "#00795a"
TEXT_ONLY, MAJORITY = "#8b3a74", "#4d4d4d"
INK, GRID = "#1f2328", "#e6e9ed"

UNITS = {
    "flops": "cost in FLOPs (largest = 1)",
    "tokens": "visual tokens",
    "latency": "milliseconds an answer",
}
CURVES = (
    ("reward", "Reward", ("reward",)),
    ("entropy", "Entropy", ("entropy",)),
    ("tokens", "Visual tokens", ("allocator/chosen_tokens", "allocator/drawn_tokens")),
)
"""Small figures of the joint step: name, title, and the columns of its log."""


def layout(x: str, y: str, **axes: Any) -> Figure:
    """Layout shared by all figures; `axes` are further keys."""
    line = {"gridcolor": GRID, "zeroline": False, "linecolor": "#afb8c1", "ticks": "outside", "tickcolor": "#afb8c1"}
    return {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "#fff",
        "plot_bgcolor": "#fff",
        "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
        "hoverlabel": {"bgcolor": "#fff", "font": {"color": INK}, "align": "left"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "xaxis": {"title": {"text": x, "standoff": 8}, **line},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True, **line},
        **axes,
    }


def frontier(summary: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against cost: `views` with one list of traces per measured unit of cost, and `layout`."""
    largest = summary["static"][-1]["flops"]
    measures: dict[str, Callable[[dict], float | None]] = {
        "flops": lambda p: p["flops"] / largest,
        "tokens": lambda p: p["tokens"],
        "latency": lambda p: p.get("latency_ms"),
    }
    views = {}
    for unit, measure in measures.items():
        if all(measure(p) for p in (*summary["static"], *summary["allocator"])):
            views[unit] = {"data": _traces(summary, measure, largest), "title": UNITS[unit]}
    lines = [_level(summary[k], name, *style) for k, name, *style in LEVELS if k in summary]
    shapes = [shape for pair in lines for shape in pair]
    return {"views": views, "layout": layout("", "accuracy", shapes=shapes)}


LEVELS = (("text_only", "text only", TEXT_ONLY, "dashdot"), ("majority", "majority answer", MAJORITY, "dot"))


def _level(point: dict[str, Any], name: str, color: str, dash: str) -> list[Figure]:
    """A control without a cost: a line across the figure, with its interval."""
    low, high = point["ci95"]
    across = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below", "legendgroup": name}
    band = {"type": "rect", "y0": low, "y1": high, "fillcolor": color, "opacity": 0.09, "line": {"width": 0}}
    y = point["accuracy"]
    line = {"type": "line", "y0": y, "y1": y, "line": {"color": color, "dash": dash, "width": 1.5}}
    return [{**across, **band}, {**across, **line, "name": name, "showlegend": True}]


def _traces(summary: dict[str, Any], measure: Callable[[dict], float | None], largest: float) -> list[Figure]:
    def curve(points: Sequence[dict], name: str, color: str, band: bool, **style: Any) -> list[Figure]:
        placed = sorted(((x, p) for p in points if (x := measure(p))), key=lambda pair: pair[0])
        if not placed:
            return []
        xs, kept = [x for x, _ in placed], [p for _, p in placed]
        low, high = ([p["ci95"][i] for p in kept] for i in (0, 1))
        y = [p["accuracy"] for p in kept]
        trace = {
            "type": "scatter",
            "x": xs,
            "y": y,
            "name": name,
            "legendgroup": name,
            "mode": "lines+markers",
            "hovertext": [f"{name}{_where(p)}<br>{describe(p, largest)}" for p in kept],
            "hoverinfo": "text",
            **style,
        }
        trace["line"] = {"color": color, **style.get("line", {})}
        trace["marker"] = {"color": color, "size": 8, **style.get("marker", {})}
        if band and len(kept) > 1:
            area = {"x": xs + xs[::-1], "y": low + high[::-1], "fill": "toself", "fillcolor": color, "opacity": 0.13}
            quiet = {"hoverinfo": "skip", "showlegend": False, "legendgroup": name, "mode": "lines"}
            return [{"type": "scatter", **area, **quiet, "line": {"width": 0}}, trace]
        up, down = ([abs(b - a) for a, b in zip(y, side, strict=True)] for side in (high, low))
        bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
        trace["error_y"] = {**bars, "thickness": 1.2, "width": 4}
        return [trace]

    static, own = summary["static"], summary["operating_point"]
    traces = curve(summary["random"], "random", RANDOM, True, line={"dash": "dot"}, marker={"symbol": "x"})
    traces += curve(static, "static", STATIC, False, line={"dash": "dash"}, marker={"symbol": "square"})
    named = [(x, p) for p in static if (x := measure(p))]
    # Below the interval, where no curve runs over them; the unseen marker keeps them off the bar's end.
    traces.append(
        {
            "type": "scatter",
            "mode": "markers+text",
            "marker": {"size": 8, "opacity": 0},
            "x": [x for x, _ in named],
            "y": [p["ci95"][0] for _, p in named],
            "text": [str(p["budget"]) for _, p in named],
            "textposition": "bottom center",
            "textfont": {"color": STATIC, "size": 12},
            "hoverinfo": "skip",
            "showlegend": False,
            "legendgroup": "static",
        }
    )
    traces += curve(summary["allocator"], "allocator", ALLOCATOR, True)
    if "oracle" in summary:
        star = {"symbol": "star", "size": 14}
        traces += curve([summary["oracle"]], "oracle", ORACLE, False, mode="markers", marker=star)
    ring = {"symbol": "circle-open", "size": 18, "line": {"width": 2.5}}
    return traces + curve([own], "operating point", ALLOCATOR, False, mode="markers", marker=ring)


def _where(point: dict[str, Any]) -> str:
    if "price" in point:
        return f" at λ = {point['price']:g}"
    return f" at {point['budget']} tokens" if point.get("budget") else ""


def describe(point: dict[str, Any], largest: float) -> str:
    """Hover text of a point."""
    low, high = point["ci95"]
    words = f"accuracy {point['accuracy']:.3f} [{low:.3f}, {high:.3f}]<br>cost {point['flops'] / largest:.3f}"
    words += f" · {point['tokens']:.1f} tokens"
    return words + (f" · {point['latency_ms']:.1f} ms" if point.get("latency_ms") else "")


def training(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Small figures over the steps of training: `id`, `title`, `data`, `layout`; none for what the log has not.

    Args:
        log: rows as the trainer logs them, with `step`.
    """
    made = []
    for name, title, columns in CURVES:
        traces = []
        for column, color, dash in zip(columns, (ALLOCATOR, STATIC), ("solid", "dash"), strict=False):
            rows = [row for row in log if column in row and "step" in row]
            if rows:
                label = column.rpartition("/")[2].replace("_", " ")
                x, y = [row["step"] for row in rows], [row[column] for row in rows]
                line = {"color": color, "dash": dash}
                traces.append({"type": "scatter", "x": x, "y": y, "name": label, "mode": "lines", "line": line})
        if traces:
            shape = layout("step", "", showlegend=len(traces) > 1)
            shape["margin"] = {**shape["margin"], "l": 40, "t": 26}
            made.append({"id": f"training-{name}", "title": title, "data": traces, "layout": shape})
    return made


def reliability(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted against observed scores, as a small figure; none without predictions."""
    scores = (summary.get("calibration") or {}).get("scores")
    if not scores:
        return []
    exact = {"x": [0, 1], "y": [0, 1], "name": "exact", "line": {"color": "#8c959f", "dash": "dot", "width": 1.5}}
    traces: list[Figure] = [{"type": "scatter", "mode": "lines", "hoverinfo": "skip", **exact}]
    colors = budget_colors(len(scores["by_budget"]))
    for (budget, found), color in zip(scores["by_budget"].items(), colors, strict=True):
        bins = found["curve"]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": str(budget),
                "x": [b["predicted"] for b in bins],
                "y": [b["observed"] for b in bins],
                "text": [f"n = {b['n']}" for b in bins],
                "line": {"color": color, "width": 1.5},
                "marker": {"color": color, "size": 7},
            }
        )
    square = {"range": [-0.02, 1.02], "constrain": "domain"}
    shape = layout("predicted score", "observed score")
    shape["xaxis"] |= square
    shape["yaxis"] |= square | {"scaleanchor": "x"}
    return [{"id": "reliability", "title": "Predicted against observed", "data": traces, "layout": shape}]


def budget_colors(n: int) -> list[str]:
    """A colour for each budget, from light to dark, of the colour-blind-safe map cividis."""
    return [to_hex(c) for c in colormaps["cividis_r"](np.linspace(0.06, 1, n))]


matplotlib.use("agg")


def plot(summary: dict[str, Any], path: Path) -> None:
    """Plot accuracy against cost: static budgets, allocator, random allocator, oracle, text only, majority answer."""
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
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)
