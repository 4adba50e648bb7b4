"""Forms of the allocator on the score tables of a finished run: does one network serve every price?

    python benchmarks/allocators.py --config runs/<run>/recipe.yaml

Fits, from nothing, `value`, one policy for all prices and one policy for each of five prices by the exact gradient on
the validation table, and compares their choices on the test table with the random allocator of the one policy's mean
budget, the static budget that validation cases prefer, and the oracle. Prints one JSON line: for each price the
utility (score less price times cost, the mean of the largest budget = 1) and the accuracy of each, with the paired
difference of the one policy to it and its 95 % interval by patient.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from frugalpath.allocator.fitting import Aim, Network, fit_by_patient, predict
from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.allocator.objectives import Objective, rung_cost
from frugalpath.allocator.policy import ExpectedReward, PolicyConfig, PolicyNetwork
from frugalpath.allocator.score_table import RunTables, ScoreTable, chosen
from frugalpath.allocator.value import ValueNetwork
from frugalpath.bootstrap import Bootstrap
from frugalpath.errors import entry
from frugalpath.evaluation.frontier import mixed
from frugalpath.recipe.cache_key import grpo_key
from frugalpath.recipe.data import load_data
from frugalpath.recipe.run import AllocatorOptions, parse_recipe
from frugalpath.rl.pipeline import train_joint

PRICES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Seen:
    """Cases of a split: look (N, K, tokens, d), question (N, T), score and cost (N, rungs), patients."""

    look: torch.Tensor
    question: torch.Tensor
    score: np.ndarray
    cost: np.ndarray
    patients: list[str]

    @classmethod
    def of(cls, table: ScoreTable, look: torch.Tensor, question: torch.Tensor) -> Seen:
        """The cases of a table."""
        return cls(look, question, table.score, table.flops / table.flops[:, -1].mean(), table.patients)


def compare(
    val: Seen,
    test: Seen,
    objective: Objective,
    options: AllocatorOptions,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit on validation cases and compare on test cases; see above for what it gives."""
    shape: dict[str, Any] = {
        "ladder": list(objective.ladder),
        "look": options.look,
        "feature_dim": val.look.shape[-1],
        "width": options.width,
        "dropout": options.dropout,
    }

    def fit(start: Network, aim: Aim[Network] | None = None) -> Network:
        scores = torch.tensor(val.score, dtype=torch.float32)
        rates = {"learning_rate": options.fit_learning_rate, "weight_decay": options.weight_decay}
        return fit_by_patient(
            start, val.look, val.question, scores, val.patients, options.fit_epochs, seed, aim, **rates
        )[0]

    def policy(low: float, high: float) -> PolicyNetwork:
        torch.manual_seed(seed)
        aim = ExpectedReward(objective, (low, high), options.entropy, options.entropy_decay)
        return fit(PolicyNetwork(PolicyConfig((low, high), **shape)), aim)

    torch.manual_seed(seed)
    predicted = predict(fit(ValueNetwork(AllocatorConfig(**shape))), test.look, test.question)
    one = policy(options.price_range[0], options.price_range[1])
    rows = []
    for price in PRICES:
        rungs = {
            "policy": one.choose(test.look, test.question, price).numpy(),
            "separate": policy(price, price).choose(test.look, test.question, price).numpy(),
            "value": objective.best(predicted, price),
            "static": np.full(len(test.score), (val.score - price * val.cost).mean(0).argmax()),
            "oracle": (test.score - price * test.cost).argmax(1),
        }
        rows.append({"price": price, **_row(test, rungs, price, Bootstrap(test.patients, resamples, seed))})
    gaps = [abs(row["separate"]["utility_less"]["value"]) for row in rows]
    return {"n": len(test.score), "n_fit": len(val.score), "prices": rows, "max_separate_difference": max(gaps)}


def _row(test: Seen, rungs: dict[str, np.ndarray], price: float, bootstrap: Bootstrap) -> dict[str, Any]:
    """Accuracy, cost and utility of each at a price, and how much less utility than the one policy."""
    worth = test.score - price * test.cost
    arms = {name: tuple(chosen(v, own) for v in (worth, test.score, test.cost)) for name, own in rungs.items()}
    arms["random"] = tuple(mixed(v, rungs["policy"]) for v in (worth, test.score, test.cost))
    row: dict[str, Any] = {}
    for name, (utility, accuracy, cost) in arms.items():
        row[name] = {"utility": utility.mean(), "accuracy": accuracy.mean(), "cost": cost.mean()}
        if name != "policy":
            row[name]["utility_less"] = bootstrap.difference(arms["policy"][0] - utility)
            row[name]["accuracy_less"] = bootstrap.difference(arms["policy"][1] - accuracy)
    return row


@entry
def main() -> None:
    """Compare on the recipe's run."""
    begin = time.perf_counter()
    run = parse_recipe()
    data = load_data(run)
    performer, start = train_joint(data)
    tables = RunTables(data, "grpo", performer, grpo_key(data))
    look = AllocatorInputs(performer, start.config)
    val, test = (Seen.of(tables[split].at(run.ladder), *look(data.splits[split])) for split in ("val", "test"))
    objective = Objective("linear", tuple(run.ladder), tuple(rung_cost(data, performer)))
    found = compare(val, test, objective, run.allocator, run.evaluation.bootstrap, run.grpo.seed)
    print(json.dumps({**found, "seed": run.grpo.seed, "seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
