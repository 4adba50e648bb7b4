"""What an allocator looks at before it spends, against what it then gives away: look cost and regret of a run.

    python benchmarks/looks.py --config configs/recipes/demo.yaml
    python benchmarks/looks.py --config configs/recipes/demo.yaml --prices 0.1 --out runs/demo/looks.png

Regret of a case at a price: the best score - price x cost of any budget, in hindsight and without a look, less that of
the budget that was chosen, its look paid for. Cost is in FLOPs; 1 is the mean answer at the largest budget. The looks:

- `none`: the static budget that is best on validation cases.
- `question`, `1`, `1+4`, ...: the value allocator, fitted anew on the question and the pooled tokens of these budgets.
- `state 1`, `confidence 1`, `state + confidence 4`: the recipe's own look, and the performer's last hidden state and
  its confidence at that budget (`allocator.look_state`, `look_confidence`).
- `sure`: budgets in sequence until the performer's confidence reaches a threshold; nothing is trained, threshold and
  first budget are chosen.
- `escalate`: budgets in sequence, as the forecast from the confidences seen says (`allocator.form: escalate`).

All are fitted, and thresholds and plans chosen, on the validation cases of the run, patients held out in turn; figures
are of its test cases. Intervals are 95 %, by bootstrap over patients; `less` is how much less the regret is than with
the recipe's own look, paired. One JSON line and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from benchmarks.measure import machine, versions
from envs.score_table import ScoreTable
from models.allocators.glance import Glance
from models.allocators.look import CheapLook
from models.allocators.network import AllocatorConfig
from models.allocators.value import ValueAllocator
from models.performer import Performer
from rewards.bootstrap import Bootstrap
from rl.allocation.escalation import best_threshold, stop_when_sure
from rl.allocation.fitting import fit_by_patient
from rl.checkpoints import is_done
from rl.deciders.base import Decisions
from rl.deciders.escalate import EscalateDecider, learn_escalate
from rl.deciders.value import ValueDecider
from rl.frontier import chosen
from rl.recipe import parse_recipe
from rl.stages import Stages
from slides.errors import InputError, entry

MOST = 64
"""Tokens of the largest budget that a look is made of."""
Decide = Callable[[float], Decisions]


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the rest, which is the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prices", nargs="+", type=float, default=[0.02, 0.1, 0.4], metavar="LAMBDA")
    parser.add_argument("--out", help="picture; default: report/looks.png of the run")
    return parser.parse_known_args(arguments)


class Looks:
    """Every kind of look at the cases of a run.

    Args:
        stages: of a finished run. performer: its trained performer. joint: its jointly trained allocator.
    """

    def __init__(self, stages: Stages, performer: Performer, joint: ValueAllocator):
        self.stages, self.performer, self.joint = stages, performer, joint
        self.ladder, self.options = stages.run.ladder, stages.run.allocator
        self.val, self.test = (stages.table("grpo", performer, s).at(self.ladder) for s in ("val", "test"))
        self.largest = float(self.val.flops[:, -1].mean())
        self.own = _named(self.options.look)

    def __iter__(self) -> Iterator[tuple[str, Decide]]:
        """Names, and what is decided at a price; each is fitted when it is reached."""
        yield "none", self._static
        for look in self._tokens():
            yield _named(look), self._value(look=look)
        first, second = self.ladder[:2]
        yield f"state {first}", self._value(look_state=first)
        yield f"confidence {first}", self._value(look_confidence=first)
        yield f"state + confidence {second}", self._value(look_state=second, look_confidence=second)
        escalate = learn_escalate(self.stages, self.performer, self.val)
        yield "sure", lambda price: self._sure(escalate, price)
        yield "escalate", lambda price: escalate.decide("test", price)

    def _tokens(self) -> list[list[int]]:
        """Looks at more and more of the smallest budgets, the question alone first; the recipe's own is among them."""
        small = [b for b in self.ladder if b <= MOST]
        looks = [small[:k] for k in range(len(small) + 1)]
        return looks if self.options.look in looks else [*looks, self.options.look]

    def _static(self, price: float) -> Decisions:
        worth = (self.val.score - price * self.val.flops / self.largest).mean(0)
        rungs = np.full(len(self.test.ids), int(worth.argmax()))
        return Decisions.from_table(price, self.test, rungs, np.zeros(len(rungs)))

    def _value(self, **changes: Any) -> Decide:
        run, cases = self.stages.run, self.stages.splits["val"]
        told = [changes.get(key) is not None for key in ("look_state", "look_confidence")]
        shape = {"look": self.options.look, "state_dim": Glance.width(self.performer, *told), **changes}
        torch.manual_seed(run.grpo.seed)
        start = ValueAllocator(
            AllocatorConfig(
                ladder=self.ladder,
                feature_dim=self.performer.bank.dim,
                width=self.options.width,
                dropout=self.options.dropout,
                **shape,
            )
        )
        allocator, values, _ = fit_by_patient(
            start,
            *CheapLook(self.performer, start.config)(cases),
            torch.tensor(self.val.score, dtype=torch.float32),
            self.val.patients,
            epochs=self.options.fit_epochs,
            learning_rate=self.options.fit_learning_rate,
            weight_decay=self.options.weight_decay,
            seed=run.grpo.seed,
        )
        decider = ValueDecider(self.stages, self.performer, allocator, values)
        return lambda price: decider.decide("test", price)

    def _sure(self, escalate: EscalateDecider, price: float) -> Decisions:
        flops = {split: escalate.looks(split) for split in ("val", "test")}
        plan = best_threshold(self.val.confidence, self.val.score, flops["val"], price, self.largest)
        rungs, spent = stop_when_sure(self.test.confidence, flops["test"], *plan)
        return Decisions.from_table(price, self.test, rungs, spent - chosen(self.test.flops, rungs))


def _named(look: Sequence[int]) -> str:
    return "+".join(map(str, look)) or "question"


def regret(table: ScoreTable, decisions: Decisions, largest: float) -> np.ndarray:
    """Of each case (N,), see the head of this file.

    Args:
        table: its columns are the rungs. largest: FLOPs that a cost of 1 stands for.
    """
    best = (table.score - decisions.price * table.flops / largest).max(1)
    return best - (decisions.score - decisions.price * decisions.cost / largest)


def measure(looks: Looks, prices: Sequence[float], resamples: int) -> list[dict[str, Any]]:
    """A row for every look and price."""
    test, largest = looks.test, looks.largest
    bootstrap = Bootstrap(test.patients, resamples, looks.stages.run.grpo.seed)
    found: dict[tuple[str, float], tuple[dict[str, Any], np.ndarray]] = {}
    start = time.perf_counter()
    for name, decide in looks:
        for price in prices:
            decisions = decide(price)
            missed = regret(test, decisions, largest)
            row = {
                "look": name,
                "price": price,
                "look_share": float(decisions.look.mean() / largest),
                "cost_share": float(decisions.cost.mean() / largest),
                "score": float(decisions.score.mean()),
                "regret": float(missed.mean()),
                "ci95": bootstrap.interval(missed),
            }
            found[name, price] = row, missed
        print(f"{name}: done after {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for (_, price), (row, missed) in found.items():
        row["less"] = bootstrap.difference(found[looks.own, price][1] - missed)
    return [row for row, _ in found.values()]


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Regret over the cost of the look, a panel a price."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    prices = list(dict.fromkeys(row["price"] for row in rows))
    figure, axes = plt.subplots(1, len(prices), figsize=(4.2 * len(prices), 4), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["look"] for row in rows))
    colours = plt.get_cmap("tab20")
    for axis, price in zip(axes[0], prices, strict=True):
        for row in (r for r in rows if r["price"] == price):
            low, high = row["ci95"]
            errors = [[row["regret"] - low], [high - row["regret"]]]
            axis.errorbar(
                max(row["look_share"], 1e-6),
                row["regret"],
                yerr=errors,
                fmt="os^Dv"[names.index(row["look"]) % 5],
                color=colours(names.index(row["look"]) % 20),
                label=row["look"],
                ms=5,
                lw=0.8,
            )
        axis.set(xscale="log", xlabel="FLOPs of the look, largest budget = 1", title=f"price {price:g}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("regret (score)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


@entry
def main() -> None:
    """Fit every look on validation cases, draw, and print one JSON line."""
    import sklearn

    options, rest = parse()
    start = time.perf_counter()
    stages = Stages(parse_recipe(rest))
    run = stages.run
    if is_done(run.folder / "grpo", stages.grpo_parts()) is None:
        raise InputError(f"{run.folder}: the run is not finished; run rl/grpo.py with this recipe first")
    looks = Looks(stages, *stages.joint())
    rows = measure(looks, options.prices, run.evaluation.bootstrap)
    picture = Path(options.out) if options.out else run.folder / "report" / "looks.png"
    draw(rows, picture)
    result = {
        "rows": rows,
        "own": looks.own,
        "n_val": len(looks.val.ids),
        "n_test": len(looks.test.ids),
        "patients": len(set(looks.test.patients)),
        "picture": str(picture),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine("cpu"),
        "versions": versions(np, torch, sklearn),
        "command": " ".join(["python", *sys.argv]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
