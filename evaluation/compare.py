"""Plot accuracy against cost for several runs on the same test cases.

    frugalpath compare --runs runs/pathosynvlm_tiny runs/locpath_tiny --out runs/compare

Reads the reports of finished runs and writes `compare.json` and `compare.png`. Each run is shown by its static budgets
and its allocator. Operating points are compared pairwise on the same cases, with bootstrap intervals over patients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("agg")
from matplotlib import pyplot as plt

from frugalpath.bootstrap import Bootstrap
from frugalpath.errors import InputError, entry
from frugalpath.evaluation.report.tables import of_patients
from frugalpath.files import atomic_write, write_text

CONTROLS = ("text_only", "majority")
GAINS = ("gain_over_text_only", "gain_over_majority")


def read_run(folder: Path) -> dict[str, Any]:
    """Read the summary and cases of a run's report.

    Raises:
        InputError: the report is missing or was written by an earlier version.
    """
    files = [folder / "report" / name for name in ("summary.json", "cases.jsonl")]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder}: no {' and no '.join(missing)}; run `frugalpath grpo` or `frugalpath pareto`")
    summary = json.loads(files[0].read_text())
    if not {*GAINS} <= set(summary["headline"]):
        raise InputError(f"{files[0]}: written by an earlier version; write it again with `frugalpath pareto`")
    cases = [json.loads(line) for line in files[1].read_text().splitlines()]
    return {"name": folder.resolve().name, "summary": summary, "cases": {c["id"]: c for c in cases}}


def compare(runs: list[dict[str, Any]], draws: int = 2000) -> dict[str, Any]:
    """Collect the points of all runs and the difference of each operating point from the first run's.

    Raises:
        InputError: the runs were tested on different cases, or two share a name.
    """
    first = runs[0]
    names = [run["name"] for run in runs]
    if len(set(names)) < len(names):
        raise InputError(f"--runs: two folders have the same name ({', '.join(names)}); rename one")
    ids = list(first["cases"])
    for run in runs[1:]:
        other = set(ids) ^ set(run["cases"])
        if other:
            raise InputError(
                f"{run['name']}: {len(other)} test cases differ from those of {first['name']}, such as "
                f"{sorted(other)[0]}; compare runs on the same cases"
            )
    bootstrap = Bootstrap([first["cases"][i]["patient"] for i in ids], draws)
    scores = {run["name"]: np.array([run["cases"][i]["score"] for i in ids]) for run in runs}
    patients = {key: first["summary"].get(key, 0) for key in ("n_patients", "n_without_patient")}
    out: dict[str, Any] = {"n": len(ids), **patients, "runs": {}}
    for run in runs:
        summary = run["summary"]
        out["runs"][run["name"]] = {
            **{key: summary[key] for key in ("operating_point", "static", "allocator", "random", *CONTROLS)},
            **{key: summary["headline"][key] for key in GAINS},
            f"over_{first['name']}": bootstrap.difference(scores[run["name"]] - scores[first["name"]]),
            "git": summary["git"],
            "command": summary["command"],
        }
    return out


def plot(found: dict[str, Any], path: Path) -> None:
    """Plot each run's static budgets (dots, with 95 % intervals), allocator (line) and controls."""
    figure, axes = plt.subplots(figsize=(7.5, 5))
    for at, (name, run) in enumerate(found["runs"].items()):
        colour = f"C{at}"
        static = run["static"]
        accuracy = np.array([p["accuracy"] for p in static])
        spread = np.abs(np.array([p["ci95"] for p in static]).T - accuracy)
        axes.errorbar([p["flops"] for p in static], accuracy, spread, fmt="o", color=colour, capsize=2, label=name)
        curve = sorted((p["flops"], p["accuracy"]) for p in run["allocator"])
        axes.plot(*zip(*curve, strict=True), "-", color=colour, lw=1)
        axes.axhline(run["text_only"]["accuracy"], color=colour, ls=":", lw=0.8)
    majority = next(iter(found["runs"].values()))["majority"]
    axes.axhline(majority["accuracy"], color="0.4", ls="--", lw=0.8, label="majority answer")
    axes.set(xscale="log", xlabel="FLOPs per answer", ylabel="score", title=f"{found['n']} test questions")
    axes.legend(title="dots: static budgets, line: allocator, dotted: text only", fontsize=8, title_fontsize=7)
    figure.tight_layout()
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")
    plt.close(figure)


def _interval(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"[{low:.3f}, {high:.3f}]".ljust(16)


@entry
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, type=Path, help="folders of finished runs")
    parser.add_argument("--out", required=True, type=Path, help="output folder")
    options = parser.parse_args()
    found = compare([read_run(folder) for folder in options.runs])
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "compare.json", json.dumps(found, indent=1) + "\n")
    plot(found, options.out / "compare.png")
    print(f"{found['n']} test questions {of_patients(found)}")
    head = f"{'':20s}{'score':>6s} {'95 % interval':16s}{'tokens':>7s}{'GFLOPs':>8s}"
    print(f"{head}  over majority           over text only")
    for name, run in found["runs"].items():
        p = run["operating_point"]
        gains = "  ".join(
            f"{gain['value']:+.3f} {_interval(gain)}"
            for gain in (run["gain_over_majority"], run["gain_over_text_only"])
        )
        print(f"{name:20s}{p['accuracy']:6.3f} {_interval(p)}{p['tokens']:7.1f}{p['flops'] / 1e9:8.3f}  {gains}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
