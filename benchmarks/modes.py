"""Joint training against sequential: what each reaches, and in what wall time after the same warm start.

    python benchmarks/modes.py --config configs/recipes/demo.yaml --out runs/modes [--set ...]

Three runs of one recipe: `joint` with the recipe's form of allocator, `sequential` with the same form, and `published`
(`sequential` with `allocator.form: text`, BiRR4CPath). Timed is `rl/allocate.py` as a whole process: GRPO, what the
allocator learns from, and its fit; not the warm start before it and not the report after it. Prints one JSON line;
ratios are sequential over joint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = {
    "allocator.form": "text",
    "allocator.text.look": "16",
    # A model made from nothing cannot write a number.
    "allocator.text.warm_start": "{max_steps: 300, learning_rate: 1.0e-3}",
}
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "joint": ("joint", {}),
    "sequential": ("sequential", {}),
    "published": ("sequential", TEXT),
}


def call(script: str, arguments: list[str]) -> float:
    """Run a script of the project; returns its wall seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(name: str, config: str, out: Path, settings: list[str], rest: list[str]) -> dict[str, Any]:
    """Wall seconds of a run's second part and its operating point."""
    mode, own = RUNS[name]
    folder = out / name
    changes = [*settings, *(f"{key}={value}" for key, value in own.items()), "evaluation.sft_continued=false"]
    arguments = ["--config", config, "--output_dir", str(folder), "--mode", mode, *rest, "--set", *changes]
    warm = call("sft/train.py", arguments)
    seconds = call("rl/allocate.py", arguments)
    call("rl/pareto.py", arguments)
    summary = json.loads((folder / "report" / "summary.json").read_text())
    point = summary["operating_point"]
    return {
        "seconds": round(seconds, 1),
        "warm_start_seconds": round(warm, 1),
        "stages": summary["seconds"],
        "n": summary["n"],
        "accuracy": point["accuracy"],
        "ci95": point["ci95"],
        "cost": point["flops"] / summary["static"][-1]["flops"],
        "stage1": point["flops_stage1"] / summary["static"][-1]["flops"],
        "best_static": max(p["accuracy"] for p in summary["static"]),
    }


def main() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs; what is finished there is kept")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--set", nargs="*", default=[], help="as of rl/grpo.py")
    options, rest = parser.parse_known_args()
    found = {}
    for name in options.runs:
        path = options.out / f"{name}.json"
        if not path.is_file():
            row = measure(name, options.config, options.out, options.set, rest)
            path.write_text(json.dumps(row) + "\n")
        found[name] = json.loads(path.read_text())
    line: dict[str, Any] = {"runs": found}
    for name, row in found.items():
        if name != "joint" and "joint" in found:
            line[f"{name}_time_ratio"] = row["seconds"] / found["joint"]["seconds"]
            line[f"{name}_accuracy_gain"] = row["accuracy"] - found["joint"]["accuracy"]
    print(json.dumps(line))


if __name__ == "__main__":
    main()
