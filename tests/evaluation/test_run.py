"""The summary of planted cases: every figure is that of the table it was made of."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from frugalpath.allocator.base import Decisions
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.bootstrap import Bootstrap
from frugalpath.envs.case import Case
from frugalpath.evaluation.latency import Latency
from frugalpath.evaluation.run import EvaluationResult, Preferred

LADDER = [1, 4, 16]
N = 120
LOOK = 0.5


@pytest.fixture
def outcome() -> EvaluationResult:
    """A third of the cases needs 1 token, a third 4, a third 16; the allocator knows which at price 0.1."""
    need = np.arange(N) % 3
    budgets = [0, *LADDER]
    score = np.concatenate([np.zeros((N, 1)), need[:, None] <= np.arange(3)], 1).astype(float)
    visual = np.tile(budgets, (N, 1))
    names, patients = [f"c{i}" for i in range(N)], [f"p{i // 2}" for i in range(N)]
    questions = ["ab"[i % 2] for i in range(N)]
    same = {k: visual for k in ("prompt", "generated", "visual")}
    text = [["?"] * 4 for _ in names]
    whole = ScoreTable(names, patients, questions, budgets, score, score, flops=visual + 1.0, text=text, **same)
    table, look = whole.at(LADDER), np.full(N, LOOK)
    rungs = {0.0: np.full(N, 2), 0.1: need, 1.0: np.zeros(N, int)}
    curve = [Decisions.from_table(p, table, r, look) for p, r in rungs.items()]
    operating = {"rule": "price", "tolerance": 0.01, "price": 0.1, "val": []}
    times = {b: np.linspace(b, b + 2, 5) for b in LADDER}
    return EvaluationResult(
        ladder=LADDER,
        cases=[
            Case(n, p, "choice", "?", "x", images=(n,), question=q)
            for n, p, q in zip(names, patients, questions, strict=True)
        ],
        whole=whole,
        curve=curve,
        decisions=curve[1],
        preferred=Preferred.of(curve, table, 2, operating),
        latency=Latency(times, dict.fromkeys(rungs, np.full(5, 0.25))),
        bootstrap=Bootstrap(patients, resamples=100),
        predicted=table.score,
        base=np.tile(table.score.mean(0), (N, 1)),
        kinds=need,
        majority=np.zeros(N),
    )


def test_the_summary_of_a_perfect_allocator(outcome):
    summary = outcome.summary()
    json.dumps(summary, allow_nan=False)
    own, found = summary["operating_point"], summary["frontier"]
    # The answers cost 2, 5 and 17; deciding 0.5.
    assert own["accuracy"] == 1 and own["flops"] == pytest.approx(8.5) and own["flops_stage1"] == LOOK
    assert own["latency_ms"] == pytest.approx((2 + 5 + 17) / 3 + 0.25)
    head = summary["headline"]
    assert head["cost_saved"] == pytest.approx(0.5) and head["cost_saved_vs_static"] == pytest.approx(0.5)
    assert head["accuracy_lost"]["value"] == 0 == head["accuracy_lost_vs_best"]["value"]
    assert head["gain_over_random"]["value"] == pytest.approx(1 - (1 / 3 + 2 / 3 + 1) / 3)
    assert head["area_over_static"]["ci95"][0] > 0 and found["mixed"]["linear"]["value"] > 0
    assert summary["oracle"]["flops"] == pytest.approx(8)
    assert found["range"] == pytest.approx([2.5 / 17, 1])
    flops, tokens, time = (found["operating"][unit] for unit in ("flops", "tokens", "latency_ms"))
    assert flops["stage1_share"] == pytest.approx(LOOK / 17)
    assert flops["equal_accuracy"]["step"]["budget"] == 16
    # Static budgets mixed to a cost of 8.5: between 5 (2/3 right) and 17 (all right).
    assert flops["equal_cost"]["accuracy"] == pytest.approx(2 / 3 + (8.5 - 5) / 12 / 3)
    assert tokens["cost"] == pytest.approx(7) and tokens["stage1"] == 0
    assert time["stage1"] == 0.25 and time["largest"] == 17
    assert summary["calibration"]["scores"]["all"]["brier"] == 0
    assert summary["calibration"]["spend"]["by_budget"]["1"]["gain"]["value"] == 0
    assert summary["calibration"]["spend"]["by_budget"]["16"]["gain"]["value"] == 1
    told = summary["information"]
    assert told["image_given_question"]["bits"] == pytest.approx(np.log2(3), abs=0.03)
    assert told["image_given_question"]["p"] < 0.01 < told["question"]["p"]
    assert summary["chosen"] == {"1": 40, "4": 40, "16": 40}


def test_tokens_read_to_decide_are_counted(outcome):
    looked = replace(outcome, decisions=replace(outcome.decisions, look_tokens=np.full(N, 3.0)), predicted=None)
    summary = looked.summary()
    tokens = summary["frontier"]["operating"]["tokens"]
    assert (tokens["cost"], tokens["stage1"]) == (pytest.approx(10), 3)
    assert summary["calibration"]["scores"] is None, "a form that predicts no scores"
