"""Accuracy against cost of a finished run, with every control.

    python rl/pareto.py --config configs/recipes/<x>.yaml

Reads the run's score tables (and makes those that are missing) and writes `report/`: summary.json, cases.jsonl and
pareto.png. All choices (best static budget, operating price) are made on validation cases; every figure is of test
cases.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.score_table import ScoreTable
from models.allocators.network import LookNetwork
from models.performer import Performer
from rewards.bootstrap import Bootstrap
from rewards.registry import gold_completion
from rl.allocate import collapse, make_decider
from rl.deciders.base import Decider, Decisions
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
from rl.report.console import print_summary
from rl.report.writing import write_report
from rl.stages import Stages
from slides.errors import entry


class Evaluation:
    """Points and headline figures of a run on its test cases.

    Args:
        stages: the run. performer: the trained performer. decider: the allocator.
    """

    def __init__(self, stages: Stages, performer: Performer, decider: Decider):
        self.stages, self.performer, self.decider = stages, performer, decider
        run = stages.run
        self.ladder = run.ladder
        self.test = stages.table("grpo", performer, "test")
        self.val = stages.table("grpo", performer, "val")
        self.bootstrap = Bootstrap(self.test.patients, run.evaluation.bootstrap, run.grpo.seed)
        self.latency = self._latency()
        self.look_ms = decider.look_ms()

    def static(self, table: ScoreTable) -> list[Point]:
        """A point for each budget of the ladder; the look is paid for where it divides a budget among slides."""
        table = table.at(self.ladder)
        flops = table.flops
        look = float(self.decider.share_look().mean())
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

    def adaptive(self, decisions: Decisions) -> tuple[Point, Point]:
        """The allocator's point, and that of the random allocator of equal mean budget."""
        table, rungs = self.test.at(self.ladder), decisions.rungs
        milliseconds = float(np.array([self.latency[b] for b in self.ladder])[rungs].mean())
        own = point(
            decisions.score,
            decisions.visual,
            decisions.flops,
            self.bootstrap,
            float(decisions.look.mean()),
            milliseconds + self.look_ms,
            price=decisions.price,
        )
        random = point(
            mixed(table.score, rungs),
            mixed(table.visual, rungs),
            mixed(table.flops, rungs),
            self.bootstrap,
            latency_ms=milliseconds,
            price=decisions.price,
        )
        return own, random

    def operating_price(self) -> float:
        """The cheapest price that is as accurate as the best on validation cases, by out-of-fold choices.

        The best of all prices and static budgets is what the others are measured against. Where the objective is
        `dual`, the price is the one that meets the target.
        """
        if self.decider.settled is not None:
            return self.decider.settled
        run, table = self.stages.run, self.val.at(self.ladder)
        bootstrap = Bootstrap(table.patients, run.evaluation.bootstrap, run.grpo.seed)
        prices = run.evaluation.prices
        decided = [self.decider.decide("val", p) for p in prices]
        best = max([*(d.score for d in decided), *table.score.T], key=np.mean)
        lost = [best - d.score for d in decided]
        cost = [float(d.cost.mean()) for d in decided]
        errors = [bootstrap.error(v) for v in lost]
        return prices[pick_price([float(v.mean()) for v in lost], errors, cost, run.evaluation.tolerance)]

    def summary(self) -> dict[str, Any]:
        """All of `summary.json` but what is known of the environment."""
        test = self.test.at(self.ladder)
        prices = self.stages.run.evaluation.prices
        price = self.operating_price()
        static = self.static(self.test)
        pairs = [self.adaptive(self.decider.decide("test", p)) for p in prices]
        decisions = self.decisions = self.decider.decide("test", price)
        own, random = self.adaptive(decisions)
        rungs = decisions.rungs
        best = oracle_rungs(test.score, test.flops)
        score, visual, flops = (chosen(v, best) for v in (test.score, test.visual, test.flops))
        oracle = point(score, visual, flops, self.bootstrap)
        k = self.best_static(self.val)
        largest = static[-1].flops
        equal = cost_at_accuracy(static, own.accuracy)
        gained = decisions.score
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
            "by_question": self._by_question(decisions, test),
            "synoptic": field_results(
                self.stages.splits["test"], texts, evaluation.bootstrap, self.stages.run.grpo.seed
            ),
            "linear_probe": linear_probe(self.stages, self.test, rungs, k, self.bootstrap),
            "warnings": collapse(self.stages, self.performer, self.decider),
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

    def _by_question(self, decisions: Decisions, test: ScoreTable) -> dict[str, Any]:
        out = {}
        for name in sorted(set(test.questions)):
            rows = np.array([q == name for q in test.questions])
            out[name] = {
                "n": int(rows.sum()),
                "static": {str(b): float(test.score[rows, k].mean()) for k, b in enumerate(self.ladder)},
                "allocator": float(decisions.score[rows].mean()),
                "tokens": float(decisions.visual[rows].mean()),
            }
        return out

    def _latency(self, sample: int = 16) -> dict[int, float]:
        """Median milliseconds of an answer at batch size 1 for every budget."""
        cases = self.stages.splits["test"][:sample]
        milliseconds = {}
        for budget in self.ladder:
            self.performer.answer(cases[:2], [budget] * len(cases[:2]), self.stages.max_new_tokens, 1)
            answers = self.performer.answer(cases, [budget] * len(cases), self.stages.max_new_tokens, 1)
            milliseconds[budget] = 1000 * float(np.median([a.seconds for a in answers]))
        return milliseconds


def evaluate(stages: Stages, performer: Performer, start: LookNetwork) -> dict[str, Any]:
    """Fit the allocator, evaluate on the test cases and write the report; returns the summary."""
    return write_report(stages, Evaluation(stages, performer, make_decider(stages, performer, start)))


@entry
def main() -> None:
    """Report on the recipe's run."""
    stages = Stages(parse_recipe())
    summary = evaluate(stages, *stages.joint())
    if stages.is_main:
        print_summary(summary, stages.run.folder / "report")


if __name__ == "__main__":
    main()
