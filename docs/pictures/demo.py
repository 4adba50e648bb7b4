"""Draw accuracy against cost of the demo from the tables of docs/results.md, so that picture and text agree.

python docs/pictures/demo.py     # writes docs/pictures/demo.png
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def rows(section: str) -> list[list[str]]:
    """The cells of all table rows in a section of the page."""
    text = (HERE.parent / "results.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0].split("\n### ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def main() -> None:
    """Write the picture."""
    table = rows("Simulated slides")
    points = {row[0]: (float(row[4]), float(row[1])) for row in table if len(row) == 5 and row[1][:1] == "."}
    static = {name.split()[1]: point for name, point in points.items() if name.startswith("static")}
    curve = sorted((float(row[3]), float(row[1])) for row in table if len(row) == 6 and row[0][:1] in "01")
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=130)
    axes.plot(*zip(*static.values(), strict=True), "s--", color="#0072b2", label="one static budget for all")
    for name, (cost, accuracy) in static.items():
        axes.annotate(name, (cost, accuracy), (0, -13), textcoords="offset points", ha="center", color="#0072b2")
    axes.plot(*zip(*curve, strict=True), "o-", color="#d55e00", ms=4, label="allocator, one point a price")
    for start, marker, label in (
        ("allocator", "o", "operating point"),
        ("random", "X", "random allocator, same mean budget"),
        ("oracle", "*", "oracle"),
    ):
        ((cost, accuracy),) = (point for name, point in points.items() if name.startswith(start))
        face = "none" if start == "allocator" else "#d55e00" if start == "oracle" else "#666666"
        axes.plot(
            cost, accuracy, marker, ms=12, mfc=face, mec="#d55e00" if face == "none" else face, label=label, ls=""
        )
    axes.set(xscale="log", xlabel="cost in FLOPs, largest budget = 1", ylabel="accuracy", ylim=(0.72, 1))
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "demo.png")


if __name__ == "__main__":
    main()
