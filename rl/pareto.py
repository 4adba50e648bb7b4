"""Accuracy against cost of a finished run, with every control.

    python rl/pareto.py --config configs/recipes/<x>.yaml

Reads the run's score tables (and makes those that are missing) and writes `report/`: summary.json, cases.jsonl and
pareto.png. All choices (best static budget, operating price) are made on validation cases; every figure is of test
cases.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from models.allocator import CheapLook, ValueAllocator
from models.performer import Performer
from rewards.bootstrap import Bootstrap
from rewards.registry import gold_completion
from rl.allocate import Fitted, fit_allocator
from rl.allocation import predict
from rl.fields import field_results
from rl.frontier import (
    Point,
    chosen,
    cost_at_accuracy,
    hypervolume,
    mixed,
    oracle_rungs,
    pick_price,
    point,
)
from rl.probe import linear_probe
from rl.recipe import parse_recipe
from rl.report import print_summary, write_report
from rl.stages import Stages
from rl.table import ScoreTable
from slides.errors import entry


class Evaluation:
    """Points and headline figures of a run on its test cases.

    Args:
        stages: the run. performer: the trained performer. fitted: the allocator.
    """

    def __init__(self, stages: Stages, performer: Performer, fitted: Fitted):
        self.stages, self.performer, self.fitted = stages, performer, fitted
        run = stages.run
        self.ladder = run.ladder
        self.test = stages.table("grpo", performer, "test")
        self.val = stages.table("grpo", performer, "val")
        self.bootstrap = Bootstrap(self.test.patients, run.evaluation.bootstrap, run.grpo.seed)
        self.stage1 = np.array([fitted.allocator.flops(len(performer.sources(c))) for c in stages.splits["test"]])
        self.rung_cost = np.array(stages.rung_cost(performer))
        self.latency, self.look_ms = self._latency()
        look = CheapLook(performer, fitted.allocator.config)
        self.values = predict(fitted.allocator, *look(stages.splits["test"]))

    def static(self, table: ScoreTable) -> list[Point]:
        """A point for each budget of the ladder; the look is paid for where it divides a budget among slides."""
        table = table.at(self.ladder)
        flops = table.flops
        look = 0.0 if self.fitted.allocator.shares is None else float(self.stage1.mean())
        return [
            point(
                table.score[:, k],
                table.visual[:, k],
                flops[:, k],
                self.bootstrap,
                look,
                self.latency[b],
                budget=b,
            )
            for k, b in enumerate(self.ladder)
        ]

    def best_static(self, table: ScoreTable) -> int:
        """Rung of the most accurate static budget of a validation table; the cheaper one of equals."""
        return int(np.argmax(table.at(self.ladder).score.mean(0)))

    def rungs(self, values: np.ndarray, price: float) -> np.ndarray:
        """Choices (N,) at a price."""
        return (values - price * self.rung_cost).argmax(1)

    def adaptive(self, price: float) -> tuple[Point, Point]:
        """The allocator's point at a price, and that of the random allocator of equal mean budget."""
        table = self.test.at(self.ladder)
        flops, rungs = table.flops, self.rungs(self.values, price)
        milliseconds = np.array([self.latency[b] for b in self.ladder])
        own = point(
            chosen(table.score, rungs),
            chosen(table.visual, rungs),
            chosen(flops, rungs),
            self.bootstrap,
            float(self.stage1.mean()),
            float(milliseconds[rungs].mean()) + self.look_ms,
            price=price,
        )
        random = point(
            mixed(table.score, rungs),
            mixed(table.visual, rungs),
            mixed(flops, rungs),
            self.bootstrap,
            latency_ms=float(milliseconds[rungs].mean()),
            price=price,
        )
        return own, random

    def operating_price(self) -> float:
        """The cheapest price that is as accurate as the best on validation cases, by out-of-fold choices.

        The best of all prices and static budgets is what the others are measured against.
        """
        run, table = self.stages.run, self.val.at(self.ladder)
        flops = table.flops
        bootstrap = Bootstrap(table.patients, run.evaluation.bootstrap, run.grpo.seed)
        prices = run.evaluation.prices
        rungs = [self.rungs(self.fitted.values, p) for p in prices]
        scores = [chosen(table.score, r) for r in rungs]
        best = max([*scores, *table.score.T], key=np.mean)
        lost = [best - s for s in scores]
        cost = [float(chosen(flops, r).mean()) for r in rungs]
        errors = [bootstrap.error(v) for v in lost]
        return prices[pick_price([float(v.mean()) for v in lost], errors, cost, run.evaluation.tolerance)]

    def summary(self) -> dict[str, Any]:
        """All of `summary.json` but what is known of the environment."""
        test = self.test.at(self.ladder)
        flops = test.flops
        prices = self.stages.run.evaluation.prices
        price = self.operating_price()
        static = self.static(self.test)
        pairs = [self.adaptive(p) for p in prices]
        own, random = self.adaptive(price)
        rungs = self.rungs(self.values, price)
        best = oracle_rungs(test.score, flops)
        oracle = point(chosen(test.score, best), chosen(test.visual, best), chosen(flops, best), self.bootstrap)
        k = self.best_static(self.val)
        largest = static[-1].flops
        equal = cost_at_accuracy(static, own.accuracy)
        gained = chosen(test.score, rungs)
        random_gain = gained - mixed(test.score, rungs)
        attribution, scores, texts = self._attribution(own)
        evaluation = self.stages.run.evaluation
        majority, nothing = self._majority(), np.zeros(len(test.ids))
        headline = {
            "price": price,
            "best_static_budget": self.ladder[k],
            "cost_saved": 1 - own.flops / largest,
            "cost_saved_vs_static": None if equal is None else 1 - own.flops / equal,
            "accuracy_lost": self.bootstrap.difference(test.score[:, k] - gained),
            "gain_over_random": self.bootstrap.difference(random_gain),
            "gain_over_text_only": self.bootstrap.difference(gained - self.test.at([0]).score[:, 0]),
            "gain_over_majority": self.bootstrap.difference(gained - majority),
            "gain_over_sft": self.bootstrap.difference(scores["grpo"] - scores["sft"]),
            "hypervolume": hypervolume([p for p, _ in pairs], largest),
            "hypervolume_static": hypervolume(static, largest),
            "tokens_share": own.tokens / static[-1].tokens,
        }
        if "sft_continued" in scores:
            headline["gain_over_sft_continued"] = self.bootstrap.difference(scores["grpo"] - scores["sft_continued"])
        return {
            "n": len(test.ids),
            "n_patients": len(set(test.patients)),
            "static": [p.to_dict() for p in static],
            "allocator": [p.to_dict() for p, _ in pairs],
            "random": [p.to_dict() for _, p in pairs],
            "oracle": oracle.to_dict(),
            "text_only": self._text_only().to_dict(),
            "majority": point(majority, nothing, nothing, self.bootstrap, budget=0).to_dict(),
            "operating_point": own.to_dict(),
            "operating_random": random.to_dict(),
            "attribution": attribution,
            "headline": headline,
            "by_question": self._by_question(rungs, test),
            "synoptic": field_results(
                self.stages.splits["test"], texts, evaluation.bootstrap, self.stages.run.grpo.seed
            ),
            "linear_probe": linear_probe(self.stages, self.test, rungs, k, self.bootstrap),
            "chosen": {str(b): int((rungs == j).sum()) for j, b in enumerate(self.ladder)},
        }

    def _attribution(self, own: Point) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, list[str]]]:
        """Points, scores and completions of the stages, each at the static budget that its validation prefers."""
        stages, names = self.stages, ["sft"]
        if stages.run.evaluation.sft_continued and stages.run.sft:
            names.append("sft_continued")
        points: dict[str, Any] = {"base": self._base().to_dict()}
        scores, texts = {}, {}
        for name in [*names, "grpo"]:
            if name == "grpo":
                tables = {"val": self.val, "test": self.test}
            else:
                performer = stages.warm_start() if name == "sft" else stages.sft_continued()
                tables = {s: stages.table(name, performer, s, self.ladder) for s in ("val", "test")}
            k = self.best_static(tables["val"])
            table = tables["test"].at([self.ladder[k]])
            scores[name] = table.score[:, 0]
            texts[name] = [row[0] for row in table.text]
            points[name] = point(
                table.score[:, 0], table.visual[:, 0], table.flops[:, 0], self.bootstrap, budget=self.ladder[k]
            ).to_dict()
        points["grpo_allocator"] = own.to_dict()
        return points, scores, texts

    def _base(self) -> Point:
        """The performer before any training here, at the largest budget."""
        table = self.stages.table("base", self.stages.base(), "test", [self.ladder[-1]])
        return point(table.score[:, 0], table.visual[:, 0], table.flops[:, 0], self.bootstrap, budget=self.ladder[-1])

    def _text_only(self) -> Point:
        table = self.test.at([0])
        return point(table.score[:, 0], table.visual[:, 0], table.flops[:, 0], self.bootstrap, budget=0)

    def _majority(self) -> np.ndarray:
        """Scores (N,) of the commonest training answer of each kind of question."""
        counts: dict[str, dict[str, int]] = {}
        for case in {c.id: c for c in self.stages.splits["train"]}.values():
            answers = counts.setdefault(case.question, {})
            answers[case.answer] = answers.get(case.answer, 0) + 1
        usual = {q: max(sorted(a), key=a.__getitem__) for q, a in counts.items()}
        cases = self.stages.splits["test"]
        texts = [gold_completion({"answer": usual.get(c.question, "")}) for c in cases]
        return self.stages.scorer(texts, cases, [0] * len(cases), [0] * len(cases))

    def _by_question(self, rungs: np.ndarray, test: ScoreTable) -> dict[str, Any]:
        out = {}
        for name in sorted(set(test.questions)):
            rows = np.array([q == name for q in test.questions])
            out[name] = {
                "n": int(rows.sum()),
                "static": {str(b): float(test.score[rows, k].mean()) for k, b in enumerate(self.ladder)},
                "allocator": float(chosen(test.score, rungs)[rows].mean()),
                "tokens": float(chosen(test.visual, rungs)[rows].mean()),
            }
        return out

    def _latency(self, sample: int = 16) -> tuple[dict[int, float], float]:
        """Milliseconds of an answer at batch size 1 for every budget, and of the allocator's look: medians."""
        cases = self.stages.splits["test"][:sample]
        milliseconds = {}
        for budget in self.ladder:
            self.performer.answer(cases[:2], [budget] * len(cases[:2]), self.stages.max_new_tokens, 1)
            answers = self.performer.answer(cases, [budget] * len(cases), self.stages.max_new_tokens, 1)
            milliseconds[budget] = 1000 * float(np.median([a.seconds for a in answers]))
        look = CheapLook(self.performer, self.fitted.allocator.config)
        times = []
        for case in cases:
            start = time.perf_counter()
            predict(self.fitted.allocator, *look([case]))
            times.append(1000 * (time.perf_counter() - start))
        return milliseconds, float(np.median(times))


def evaluate(stages: Stages, performer: Performer, start: ValueAllocator) -> dict[str, Any]:
    """Fit the allocator, evaluate on the test cases and write the report; returns the summary."""
    fitted = fit_allocator(stages, performer, start, stages.table("grpo", performer, "val"))
    evaluation = Evaluation(stages, performer, fitted)
    return write_report(stages, evaluation)


@entry
def main() -> None:
    """Report on the recipe's run."""
    stages = Stages(parse_recipe())
    summary = evaluate(stages, *stages.joint())
    if stages.is_main:
        print_summary(summary, stages.run.folder / "report")


if __name__ == "__main__":
    main()
