"""How far bfloat16 takes TRL's GRPOTrainer and ours from float32: same weights, prompts and completions.

    python benchmarks/bf16.py
    python benchmarks/bf16.py --settings sharp       # attention scores four times as large, so errors are larger
    python benchmarks/bf16.py --settings large --device cuda --attention flex     # on a GPU

Ours reads a prompt once for its G completions, TRL G times, so that sums are rounded in another order. Here a step of
each is compared with the same step of TRL's trainer in float32. `*_error` is the relative L2 error of the gradient,
all tensors as one vector, `logp_*` the root mean square error of the completions' log-probabilities; `tensor_*` are of
single tensors, their median and the worst. Ratios are ours over TRL's: above 1 ours is further off.

Two ways of bfloat16: `autocast`, float32 weights and `bf16: true`, and `weights`, bfloat16 weights and `bf16: true`.
Each seed has weights, prompts and completions of its own; weights are numbers of bfloat16, so that only the work is
rounded. Errors are geometric means over seeds, then over the settings and ways; intervals (95 %) are of Student's t
over the seeds, which both trainers share. `float32_*` say how far ours in float32 is from TRL's, in the worst setting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.measure import machine, settle, versions

WAYS = ("autocast", "weights")
MEASURES = ("grad", "logp", "median", "max")
TRAINERS = ("stock", "ours")
Cell = dict[str, dict[str, list[float]]]
"""Errors of the seeds, by trainer and measure."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", choices=["small", "sharp", "large"], default="small", help="large: for a GPU")
    parser.add_argument("--only", default="", help="those settings alone whose name in the table has this in it")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=4, help="of each setting; at least 2 for an interval")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--attention", choices=["sdpa", "flex"], default="sdpa", help="of ours; flex needs a GPU")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that the benchmark may use")
    options = parser.parse_args()
    if options.attention == "flex" and options.device == "cpu":
        parser.error("--attention flex trains on a GPU only: add --device cuda")
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give at least 1")
    options.dtype = "bfloat16"
    return options


def measure(setting: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Errors of both trainers, each way and seed, and how far ours in float32 is from the truth."""
    from benchmarks.rounding import Outcome, errors, outcomes

    truth: dict[int, Outcome] = {}
    flex = options.attention == "flex"

    def run(trainer: str, way: str, count: int) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {m: [] for m in MEASURES}

        def keep(step: int, outcome: Outcome) -> None:
            for name, value in errors(outcome, truth[step]).items():
                found[name].append(value)

        outcomes(setting, trainer, way, options.first_seed, count, options.device, flex, keep)
        return found

    outcomes(setting, "stock", "float32", options.first_seed, options.seeds, options.device, flex, truth.__setitem__)
    exact = run("ours", "float32", 1)
    return {
        "float32": {m: values[0] for m, values in exact.items()},
        "ways": {way: {t: run(t, way, options.seeds) for t in TRAINERS} for way in options.ways},
    }


def pool(cells: Sequence[Cell], measure: str) -> dict[str, Any]:
    """Geometric means of an error over the cells' seeds and the cells, and their ratio.

    Args:
        cells: independent of each other.

    Returns:
        `ours`, `stock`, `ratio` (ours over stock) and `interval`, its 95 % confidence interval; None of a single seed.
    """
    from scipy.stats import t

    logs = {name: [[math.log(e) for e in cell[name][measure]] for cell in cells] for name in TRAINERS}
    means = {name: statistics.fmean(statistics.fmean(c) for c in own) for name, own in logs.items()}
    apart = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(logs["ours"], logs["stock"], strict=True)]
    ratio, interval = means["ours"] - means["stock"], None
    if min(map(len, apart)) > 1:
        error = math.sqrt(sum(statistics.variance(c) / len(c) for c in apart)) / len(apart)
        half = float(t.ppf(0.975, sum(len(c) - 1 for c in apart))) * error
        interval = [round(math.exp(ratio - half), 4), round(math.exp(ratio + half), 4)]
    return {
        "ours": float(f"{math.exp(means['ours']):.3g}"),
        "stock": float(f"{math.exp(means['stock']):.3g}"),
        "ratio": round(math.exp(ratio), 4),
        "interval": interval,
    }


def over_ways(ways: dict[str, Cell]) -> Cell:
    """One cell of a setting's ways, which share their seeds: geometric means of every seed's errors."""
    return {
        t: {
            m: [statistics.geometric_mean(e) for e in zip(*(c[t][m] for c in ways.values()), strict=True)]
            for m in MEASURES
        }
        for t in TRAINERS
    }


def summarize(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is printed of the settings, from what `measure` gave of each."""
    whole = [over_ways(own["ways"]) for own in found.values()]
    pooled = {m: pool(whole, m) for m in MEASURES}
    ways = list(next(iter(found.values()))["ways"])
    exact = [own["float32"] for own in found.values()]
    return {
        "ours_error": pooled["grad"]["ours"],
        "stock_error": pooled["grad"]["stock"],
        "ratio": pooled["grad"]["ratio"],
        "ratio_interval": pooled["grad"]["interval"],
        "logp_ours_error": pooled["logp"]["ours"],
        "logp_stock_error": pooled["logp"]["stock"],
        "logp_ratio": pooled["logp"]["ratio"],
        "logp_ratio_interval": pooled["logp"]["interval"],
        "tensor_median": pooled["median"],
        "tensor_max": pooled["max"],
        "by_way": {way: pool([own["ways"][way] for own in found.values()], "grad") for way in ways},
        "float32_grad_difference": max(e["grad"] for e in exact),
        "float32_logp_difference": max(e["logp"] for e in exact),
        "table": [
            {"setting": name, "way": way, **{m: pool([cell], m) for m in MEASURES}}
            for name, own in found.items()
            for way, cell in own["ways"].items()
        ],
    }


def main() -> None:
    """Measure all settings and print one JSON line."""
    options = parse()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed greets on stdout
        settle(options)
        import torch
        import transformers
        import trl

        from benchmarks.rounding import SETTINGS

        torch.set_num_threads(options.cores)
        torch.backends.cudnn.allow_tf32 = False  # the truth is float32 in the patches' convolution too
        chosen = [s for s in SETTINGS[options.settings] if options.only in s.name]
        if not chosen:
            names = "; ".join(s.name for s in SETTINGS[options.settings])
            raise SystemExit(f"--only {options.only!r}: no such setting; there are: {names}")
        start, found = time.perf_counter(), {}
        for setting in chosen:
            print(f"{setting.name} ...", file=sys.stderr, flush=True)
            found[setting.name] = measure(setting, options)
    result = {
        **summarize(found),
        "n": options.seeds,
        "statistic": "geometric means over seeds, settings and ways; 95 % intervals over the seeds",
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(options.device),
        "options": vars(options),
        "versions": versions(torch, transformers, trl),
        "command": shlex.join(["python", "benchmarks/bf16.py", *sys.argv[1:]]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
