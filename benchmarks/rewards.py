"""Completions a second that the reward `synoptic` scores on one core.

    python benchmarks/rewards.py --protocol breast_resection

The completions are the gold report, its lines in another order, and the report with fields dropped, changed or made
unreadable, in equal shares. Every completion has a thinking part and a number of its own in the answer, so that no
whole text comes twice. Values of single fields do come again, as they do in training. The printed JSON line holds the
median, and the range, over repeats with different completions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import rapidfuzz
import scipy

from frugalpath.errors import entry
from frugalpath.rewards.synoptic.protocol import Field, Protocol, load_protocol
from frugalpath.rewards.synoptic.render import render_report
from frugalpath.rewards.synoptic.reward import synoptic


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", default="breast_resection")
    parser.add_argument("--fields", type=int, default=20, help="fields of the gold report, at most")
    parser.add_argument("--completions", type=int, default=2000, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def example(field: Field, rng: random.Random) -> object:
    """A value of a field."""
    if field.type == "list":
        return [{inner.id: example(inner, rng) for inner in field.fields} for _ in range(2)]
    if field.values:
        value = rng.choice(list(field.values))
        return [value] if field.type == "multi" else value
    return rng.randint(1, 40) if field.type in ("number", "integer") else f"remark on specimen {rng.randint(1, 10**6)}"


def completions(protocol: Protocol, fields: int, n: int, rng: random.Random) -> tuple[str, list[str]]:
    """A gold report and n completions, no two alike."""
    chosen = protocol.fields[:fields]
    gold = {field.id: example(field, rng) for field in chosen}
    made = []
    for i in range(n):
        record = dict(gold)
        if i % 4 == 1:
            record = dict(rng.sample(list(record.items()), len(record)))
        elif i % 4 == 2:
            for field in rng.sample(chosen, len(chosen) // 4):
                record[field.id] = example(field, rng)
        elif i % 4 == 3:
            record.pop(rng.choice(list(record)))
        text = render_report(record, protocol) + (f"\nunreadable: {i}" if i % 4 else f"\n#{rng.random()}")
        made.append(f"<think>slide {i}, {rng.random()}</think><answer>{text}</answer>")
    return render_report(gold, protocol), made


@entry
def main() -> None:
    """Time the reward, print one JSON line."""
    arguments = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    protocol, rng = load_protocol(arguments.protocol), random.Random(0)
    speeds, means = [], []
    for repeat in range(arguments.repeats + 1):
        gold, made = completions(protocol, arguments.fields, arguments.completions, rng)
        start = time.perf_counter()
        scores = synoptic(made, answer=[gold] * len(made), protocol=[protocol.id] * len(made))
        if repeat:  # the first fills the caches of values
            speeds.append(len(made) / (time.perf_counter() - start))
            means.append(statistics.mean(s for s in scores if s is not None))
    result = {
        "completions_per_s": round(statistics.median(speeds)),
        "completions_per_s_range": [round(min(speeds)), round(max(speeds))],
        "n": arguments.completions,
        "repeats": arguments.repeats,
        "statistic": "median",
        "protocol": protocol.id,
        "fields": min(arguments.fields, len(protocol.fields)),
        "mean_score": round(statistics.mean(means), 3),
        "cores": 1,
        "versions": {
            "python": platform.python_version(),
            "numpy": numpy.__version__,
            "rapidfuzz": rapidfuzz.__version__,
            "scipy": scipy.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
