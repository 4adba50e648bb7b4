"""A budget for each slide of a case, against equal shares, at equal cost.

    python benchmarks/case_budgets.py --config configs/recipes/<x>.yaml --set allocator.share=split
    python benchmarks/case_budgets.py --config configs/recipes/<x>.yaml --stage sft --prices 0.02 0.1

Reads the run's performer (and trains it where the run is not finished), answers the validation cases at random splits,
fits the split allocator on them, and compares on the test cases, at each price, its choices with

- `equal`: equal shares of the static budgets that cost as much (the two next to it, mixed).
- `value`: equal shares of a budget by case, by predicted score, at the prices that cost as much (likewise).
- `attention`: the same with shares by attention, learned with that prediction on the same validation answers.
- `random`: the chosen total of every case, divided at random (uniform over all divisions).
- `shuffled`: the chosen budgets of every case, handed to its slides in random order.

One JSON line: costs are FLOPs with those of deciding, the mean of the largest equal budget = 1; differences are of the
split's score less the other's on the same cases, with 95 % bootstrap intervals by patient. No price is picked: all
that are asked for are printed. `uneven` is the share of cases whose slides differ in budget, `hidden` that with a
slide that is not shown, `look_share` the FLOPs of deciding over those of an answer at the smallest equal budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from models.allocators.look import CheapLook
from models.allocators.network import AllocatorConfig
from models.allocators.value import ValueAllocator
from models.performer import Performer
from models.share_out import share_out
from rewards.bootstrap import Bootstrap
from rl.allocation.choice import Split
from rl.allocation.fitting import fit_by_patient, predict
from rl.deciders.split import BATCH, SplitDecider, fit_split, rooms_of
from rl.frontier import chosen
from rl.recipe import parse_recipe
from rl.stages import Stages
from slides.errors import InputError, entry

Curve = list[tuple[np.ndarray, np.ndarray]]
"""Score and cost (N,) of each point."""


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and those of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--stage", choices=["grpo", "sft"], default="grpo", help="whose performer is asked")
    parser.add_argument("--prices", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3])
    return parser.parse_known_args()


def at_cost(curve: Curve, cost: float) -> np.ndarray:
    """Scores (N,) of a curve's two points next to a mean cost, mixed to cost as much; its end beyond it."""
    points = sorted(curve, key=lambda p: float(p[1].mean()))
    means = [float(c.mean()) for _, c in points]
    above = int(np.searchsorted(means, cost))
    if above in (0, len(points)):
        return points[min(above, len(points) - 1)][0]
    share = (cost - means[above - 1]) / (means[above] - means[above - 1])
    return (1 - share) * points[above - 1][0] + share * points[above][0]


def value_curve(stages: Stages, decider: SplitDecider, start: ValueAllocator, attention: bool) -> Curve:
    """A value allocator fitted on the validation answers at equal shares, over all prices of the recipe."""
    run, performer, name = stages.run, decider.performer, decider.name
    options, cases = run.allocator, stages.splits
    if attention:
        torch.manual_seed(run.grpo.seed)
        shape = {**start.config.to_dict(), "share": "attention"}
        apart = ValueAllocator(AllocatorConfig(**{k: v for k, v in shape.items() if k != "model_type"}))
        apart.load_state_dict(start.state_dict(), strict=False)
        start = apart
    look = CheapLook(performer, start.config)
    scores = torch.tensor(stages.table(name, performer, "val").at(run.ladder).score, dtype=torch.float32)
    allocator, _, _ = fit_by_patient(
        start,
        *look(cases["val"]),
        scores,
        [c.patient for c in cases["val"]],
        options.fit_epochs,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        batch_size=BATCH,
        seed=run.grpo.seed,
        learn_shares=attention,
    )
    rooms = [r.equal for r in rooms_of(performer, cases["test"], decider.allocator.config)]
    if attention:
        shares = look.divide(allocator, cases["test"])
        rooms = [divided(performer, c, w, run.ladder) for c, w in zip(cases["test"], shares, strict=True)]
    rows = decider.answers("test", rooms)
    score, flops = (np.array([[getattr(f, k) for f in row] for row in rows]) for k in ("score", "flops"))
    values = predict(allocator, *look(cases["test"]))
    own = np.array([allocator.flops(len(performer.sources(c))) for c in cases["test"]])
    rungs = [(values - p * np.array(stages.rung_cost(performer))).argmax(1) for p in run.evaluation.prices]
    return [(chosen(score, r), chosen(flops, r) + own) for r in rungs]


def divided(
    performer: Performer, case: Any, weights: Sequence[float] | None, ladder: Sequence[int]
) -> tuple[Split, ...]:
    """A case's splits by weight at every budget of the ladder."""
    room = [performer.room(s) for s in performer.sources(case)]
    return tuple(tuple(share_out(b, weights or [1.0] * len(room), room)) for b in ladder)


def controls(stages: Stages, decider: SplitDecider, splits: Sequence[Split]) -> dict[str, np.ndarray]:
    """Scores (N,) of the splits' totals divided at random, and of their budgets handed to other slides at random."""
    rng = np.random.default_rng(stages.run.grpo.seed)
    asked: dict[str, list[Split]] = {"random": [], "shuffled": []}
    for case, split in zip(stages.splits["test"], splits, strict=True):
        room = [decider.performer.room(s) for s in decider.performer.sources(case)]
        asked["random"].append(tuple(share_out(sum(split), rng.exponential(size=len(split)).tolist(), room)))
        mixed = [split[k] for k in rng.permutation(len(split))]
        asked["shuffled"].append(tuple(share_out(sum(split), mixed, room)))
    return {
        name: np.array([row.score for (row,) in decider.answers("test", [[s] for s in own])])
        for name, own in asked.items()
    }


def measure(stages: Stages, stage: str, prices: Sequence[float]) -> dict[str, Any]:
    """All that is printed."""
    if stage == "grpo":
        performer, start = stages.joint()
    else:
        performer = stages.warm_start()
        start = stages.new_allocator(performer)
    began = time.perf_counter()
    decider = fit_split(stages, performer, start, stage)
    test = stages.table(stage, performer, "test").at(stages.run.ladder)
    bootstrap = Bootstrap(test.patients, stages.run.evaluation.bootstrap, stages.run.grpo.seed)
    largest = float(test.flops[:, -1].mean())
    curves: dict[str, Curve] = {"equal": list(zip(test.score.T, test.flops.T, strict=True))}
    curves |= {k: value_curve(stages, decider, start, k == "attention") for k in ("value", "attention")}
    questions = np.array(test.questions)
    points = []
    for price in prices:
        decisions = decider.decide("test", price)
        splits, _ = decider.decided("test", price)
        cost = float(decisions.cost.mean())
        others = {name: at_cost(curve, cost) for name, curve in curves.items()}
        others |= controls(stages, decider, splits)
        points.append(
            {
                "price": price,
                "cost": cost / largest,
                "tokens": float(decisions.visual.mean()),
                "uneven": float(np.mean([len(set(s)) > 1 for s in splits])),
                "hidden": float(np.mean([0 in s for s in splits])),
                "score": float(decisions.score.mean()),
                "ci95": bootstrap.interval(decisions.score),
                "less": {name: bootstrap.difference(decisions.score - other) for name, other in others.items()},
                "by_question": {
                    q: {
                        "n": int((questions == q).sum()),
                        "split": float(decisions.score[questions == q].mean()),
                        **{k: float(v[questions == q].mean()) for k, v in others.items()},
                    }
                    for q in sorted(set(test.questions))
                },
            }
        )
    smallest = float(test.flops[:, 0].mean())
    return {
        "n": len(test.ids),
        "patients": len(set(test.patients)),
        "fitted_on": len(stages.splits["val"]),
        "equal": {
            str(b): {"score": float(s.mean()), "ci95": bootstrap.interval(s), "cost": float(f.mean()) / largest}
            for b, s, f in zip(test.budgets, test.score.T, test.flops.T, strict=True)
        },
        "points": points,
        "look_share": float(decider.decide("test", prices[0]).look.mean()) / smallest,
        "seconds": time.perf_counter() - began,
    }


@entry
def main() -> None:
    """Measure and print one JSON line."""
    own, rest = parse()
    run = parse_recipe(rest)
    if run.allocator.share != "split":
        raise InputError("allocator.share: the benchmark measures `split`; add --set allocator.share=split")
    print(json.dumps(measure(Stages(run), own.stage, own.prices)))


if __name__ == "__main__":
    main()
