"""How soon `report.html` is there: milliseconds from opening the file to a drawn page, in a fresh headless Chromium.

    python benchmarks/report_page.py --cases 5000

The report is made up, by the same code as a run's, with twelve cases in pictures of the largest size. Network is off.
Each opening is by a browser that has just started and has no cache. The printed JSON line has the median and the range
over repeats; `first_paint_ms` is when text can be read, `ready_ms` when the frontier is drawn too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.browser import Browser, find_chromium
from frugalpath.allocator.base import Decisions
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.bootstrap import Bootstrap
from frugalpath.envs.case import Case
from frugalpath.errors import InputError, entry
from frugalpath.evaluation.latency import Latency
from frugalpath.evaluation.report.pictures import SIDE, Shown, jpeg
from frugalpath.evaluation.report.writing import curves, reproduce, write_outcome
from frugalpath.evaluation.run import EvaluationResult, Preferred

LADDER = [1, 4, 16, 64, 256]
PRICES = [0.0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 1.0]
ANSWERS = {"diagnosis": ["benign", "malignant"], "grade": ["1", "2", "3"], "quadrant": ["left", "right", "none"]}
PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def made_up(n: int, seed: int = 0) -> EvaluationResult:
    """What came of an allocator on n made-up cases: their need of tokens differs, and it is seen dimly."""
    rng = np.random.default_rng(seed)
    questions = [list(ANSWERS)[i % len(ANSWERS)] for i in range(n)]
    cases = [
        Case(f"case{i:05d}", f"patient{i // 3}", "choice", f"Which {q} is shown?", str(rng.choice(ANSWERS[q])),
             images=(f"{i}.png",), options=tuple(ANSWERS[q]), question=q)
        for i, q in enumerate(questions)
    ]  # fmt: skip
    budgets = np.array([0, *LADDER])
    need = rng.normal([{"diagnosis": 1.0, "grade": 3.0, "quadrant": 5.0}[q] for q in questions], 1.5)
    chance = 0.25 + 0.7 / (1 + np.exp(2 * (need[:, None] - np.log2(budgets + 1))))
    score = (rng.random((n, len(budgets))) < chance).astype(float)
    visual = np.tile(budgets, (n, 1))
    text = [
        [f"<answer>{c.answer if right else 'none'}</answer>" for right in row]
        for c, row in zip(cases, score, strict=True)
    ]
    whole = ScoreTable(
        [c.id for c in cases], [c.patient for c in cases], questions, budgets.tolist(), score, chance, visual,
        np.full_like(visual, 20), np.full_like(visual, 6), 2.5e7 + 2e6 * visual, text,
    )  # fmt: skip
    table = whole.at(LADDER)
    predicted = np.clip(chance[:, 1:] + rng.normal(0, 0.1, (n, len(LADDER))), 0, 1)
    cost, look = table.flops[0] / table.flops[0, -1], np.full(n, 2.2e5)
    curve = [Decisions.from_table(p, table, (predicted - p * cost).argmax(1), look) for p in PRICES]
    operating = {"rule": "price", "tolerance": 0.01, "price": 0.05, "val": []}
    times = {b: 14 + 0.02 * b + rng.random(32) for b in LADDER}
    return EvaluationResult(
        ladder=LADDER,
        cases=cases,
        whole=whole,
        curve=curve,
        decisions=curve[5],
        preferred=Preferred.of(curve, table, len(LADDER) - 1, operating),
        latency=Latency(times, {p: 0.5 + rng.random(32) for p in PRICES}),
        bootstrap=Bootstrap(table.patients, 100, seed),
        predicted=predicted,
        base=np.tile(table.score.mean(0), (n, 1)),
        kinds=rng.integers(0, 8, n),
        majority=rng.integers(0, 2, n).astype(float),
    )


def summary_of(outcome: EvaluationResult) -> dict[str, Any]:
    """The whole summary of a made-up outcome, as a run writes it."""
    summary = outcome.summary()
    rng = np.random.default_rng(0)
    log = [
        {"step": 10 * i, "reward": 1 - np.exp(-i / 9) + rng.normal(0, 0.02), "entropy": 0.2 + 0.5 / (i + 1),
         "allocator/chosen_tokens": 60.0 - i, "allocator/drawn_tokens": 80.0 - i}
        for i in range(40)
    ]  # fmt: skip
    stages = dict(zip(("base", "sft", "sft_continued", "grpo"), summary["static"], strict=False))
    return {
        **summary,
        "attribution": {**stages, "grpo_allocator": summary["operating_point"]},
        "training": curves(log),
        "reproduce": reproduce(summary, ["--config", "configs/recipes/made_up.yaml"]),
        "warnings": ["one rung for most images; raise allocator.explore"],
        "missing_slides": [{"slide": "a.svs", "reason": "no tissue", "cases": 2}],
        "splits": {"train": 100, "val": 50, "test": summary["n"]},
        "price_unit": "score per cost of the largest budget",
        "ladder": LADDER,
        "seed": 0,
        "versions": {"python": platform.python_version()},
        "git": "0123456789ab",
        "command": "frugalpath pareto --config configs/recipes/made_up.yaml",
    }


def pictures(name: str, budget: int) -> list[Shown]:
    """Pictures as large as they get."""
    noise = np.random.default_rng(budget).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return [Shown("image 1", jpeg(noise), jpeg(noise), budget, "made up")]


@entry
def main() -> None:
    """Write the page, open it, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        raise InputError("no Chromium or Chrome is installed; apt-get install chromium")
    shown, ready = [], []
    with tempfile.TemporaryDirectory() as folder:
        outcome = made_up(arguments.cases)
        write_outcome(Path(folder), outcome, summary_of(outcome), pictures)
        page = Path(folder) / "report.html"
        load = os.getloadavg()[0]
        for _ in range(arguments.repeats):
            with Browser(chromium) as browser:
                ready.append(browser.open(page))
                shown.append(browser.evaluate(PAINT))
                version_text = browser.call("Browser.getVersion")["product"]
        size = page.stat().st_size
    result = {
        "ready_ms": round(statistics.median(ready)),
        "ready_ms_range": [round(min(ready)), round(max(ready))],
        "first_paint_ms": round(statistics.median(shown)),
        "first_paint_ms_range": [round(min(shown)), round(max(shown))],
        "cases": arguments.cases,
        "repeats": arguments.repeats,
        "statistic": "median",
        "page_mb": round(size / 1e6, 2),
        "load_average": round(load, 1),
        "cores": os.cpu_count(),
        "browser": version_text,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
