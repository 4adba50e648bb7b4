"""Calibration, spend against gain, information, operating price and latency: planted cases with known figures."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from frugalpath.allocator.base import Allocator, Decisions, TrainedRun
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.bootstrap import Bootstrap
from frugalpath.evaluation.latency import TIMED, measure, measured_once
from frugalpath.evaluation.metrics import (
    base_rates,
    budget_information,
    calibration,
    entropy,
    image_kinds,
    mutual_information,
    rank_correlation,
    reliability,
    spend,
)
from frugalpath.evaluation.run import operating_price
from frugalpath.recipe.run import AllocatorOptions, EvaluationOptions

N = 4000
BUDGETS = [1, 4, 16]


def patients(n: int) -> Bootstrap:
    """Two cases a patient."""
    return Bootstrap([str(i // 2) for i in range(n)], resamples=200)


def test_a_perfect_predictor_is_calibrated_and_a_sure_one_is_not():
    rng = np.random.default_rng(0)
    rate = rng.random(N)
    score = (rng.random(N) < rate).astype(float)
    base = np.full(N, score.mean())
    true, sure = reliability(rate, score, base), reliability((rate > 0.5).astype(float), score, base)
    # Ten bins of 400: the deviation of each mean is about 0.4 / sqrt(400) = 0.02.
    assert true["ece"] < 0.03 and sure["ece"] == pytest.approx(0.25, abs=0.03)
    # The uniform rate has variance 1/12, the score 1/4: the share that is explained is a third.
    assert true["brier_skill"] == pytest.approx(1 / 3, abs=0.03)
    assert sure["brier_skill"] < true["brier_skill"]
    assert [b["n"] for b in true["curve"]] == [N // 10] * 10
    assert [b["n"] for b in sure["curve"]] == [int((rate <= 0.5).sum()), int((rate > 0.5).sum())], "equals share a bin"


def test_the_base_rate_has_no_skill_and_its_own_knowledge_is_counted():
    score = np.array([[1.0, 1], [1, 0], [0, 0], [0, 0]])
    base = base_rates(score, ["q", "q", "r", "r"], ["r", "q", "new"])
    np.testing.assert_array_equal(base, [[0, 0], [1, 0.5], [0.5, 0.25]])
    own = base_rates(score, ["q", "q", "r", "r"], ["q", "q", "r", "r"])
    found = calibration(own, score, own, [1, 4])
    assert found["by_budget"]["4"]["brier_skill"] == 0 and found["all"]["ece"] == 0
    assert found["by_budget"]["1"]["brier_skill"] is None, "a base rate without error leaves nothing to gain"


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_the_rank_correlation_is_spearmans(seed, levels):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, levels + 1, 30), rng.normal(size=30).round(levels - 1)
    found = rank_correlation(x, y, Bootstrap([str(i) for i in range(30)], resamples=50))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found == {"value": None, "ci95": None}
    else:
        assert found["value"] == pytest.approx(spearmanr(x, y).statistic)
        assert found["ci95"][0] <= found["ci95"][1]


def test_the_rank_correlation_of_a_resample_is_that_of_its_cases():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 3, 20), rng.integers(0, 3, 20)
    bootstrap = Bootstrap([str(i // 2) for i in range(20)], resamples=40)
    drawn = []
    for weight in bootstrap.weight:
        rows = np.repeat(np.arange(20), weight[bootstrap.group].astype(int))
        drawn.append(spearmanr(x[rows], y[rows]).statistic)
    assert rank_correlation(x, y, bootstrap)["ci95"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_more_is_spent_where_it_helps():
    # Half of the cases need the largest budget and get it.
    hard = np.arange(200) % 2 == 1
    score = np.ones((200, 3))
    score[hard, :2] = 0
    tokens = np.where(hard, 16, 1)
    found = spend(score, tokens, np.where(hard, 2, 0), BUDGETS, patients(200))
    assert found["by_budget"]["1"] == {"n": 100, "gain": {"value": 0, "ci95": [0, 0]}}
    assert found["by_budget"]["16"] == {"n": 100, "gain": {"value": 1, "ci95": [1, 1]}}
    assert "4" not in found["by_budget"]
    assert found["rank_correlation"]["value"] == pytest.approx(1)
    wasted = spend(score, np.where(hard, 1, 16), np.where(hard, 0, 2), BUDGETS, patients(200))
    assert wasted["rank_correlation"]["value"] == pytest.approx(-1)


def test_entropy_and_information_of_planted_labels():
    x = np.arange(N) % 4
    # The correction adds (cells - 1) / 2N nats.
    assert entropy(x) == pytest.approx(2 + 3 / (2 * N * np.log(2)))
    assert mutual_information(x, x) == pytest.approx(2, abs=1e-3)
    assert mutual_information(x % 2, x // 2) == pytest.approx(0, abs=1e-3)
    both = (x % 2 + x // 2) % 2
    assert mutual_information(both, x % 2) == pytest.approx(0, abs=1e-3)
    assert mutual_information(both, x % 2, x // 2) == pytest.approx(1, abs=1e-3), "told only with the other one known"


def test_the_correction_takes_off_what_chance_gives():
    found = []
    for seed in range(100):
        x, y = np.random.default_rng(seed).integers(0, 5, (2, 200))
        found.append(mutual_information(x, y))
    # Without it the mean would be about 16 / (2 * 200) nats = 0.058 bits.
    assert np.mean(found) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("by", ["question", "image", "nothing"])
def test_what_the_budget_tells(by):
    rng = np.random.default_rng(2)
    questions, kinds = rng.integers(0, 2, 600), rng.integers(0, 3, 600)
    told = {"question": questions, "image": kinds, "nothing": rng.integers(0, 3, 600)}[by]
    rungs = np.where(rng.random(600) < 0.8, told, rng.integers(0, 3, 600))
    found = budget_information(rungs, [f"q{q}" for q in questions], kinds)
    small = {name: found[name]["p"] < 0.01 for name in ("question", "image_given_question")}
    assert small == {"question": by == "question", "image_given_question": by == "image"}
    for row in (found["question"], found["image_given_question"]):
        assert row["nats"] == pytest.approx(row["bits"] * np.log(2)) and row["chance"] < row["chance95"]
    assert found["image_given_question"]["bits"] < found["image_at_most"] + 1e-9
    assert found["image_kinds"] == 3


def test_a_budget_for_all_tells_nothing():
    found = budget_information(np.zeros(50, int), ["q", "r"] * 25, np.arange(50) % 5)
    assert found["entropy"] == 0 and found["question"]["bits"] == pytest.approx(0, abs=1e-12)
    assert found["question"]["p"] == 1


def test_images_are_told_apart_by_their_features_and_count_once():
    rng = np.random.default_rng(3)
    group = np.repeat([0, 1], 15)
    features = np.repeat(rng.normal(10 * group[:, None], 1, (30, 5)), 2, axis=0)
    kinds = image_kinds(features, [i // 2 for i in range(60)])
    assert len(set(kinds)) == 3, "ten images a kind"
    assert (kinds[::2] == kinds[1::2]).all()
    assert not set(kinds[:30]) & set(kinds[30:])
    assert set(image_kinds(features[:6], [0, 0, 1, 1, 2, 2])) == {0}, "too few images for kinds"


def table(score: np.ndarray) -> ScoreTable:
    n, k = score.shape
    same = np.tile(np.array(BUDGETS), (n, 1))
    names = [str(i) for i in range(n)]
    arrays = dict.fromkeys(("confidence", "visual", "prompt", "generated"), same)
    return ScoreTable(names, names, ["q"] * n, BUDGETS, score, flops=same * 1.0, text=[[""] * k] * n, **arrays)


@pytest.mark.parametrize(
    ("options", "price"),
    [
        ({"operating": "within", "tolerance": 0.0}, 0.1),  # the best static budget scores 0.90
        ({"operating": "within", "tolerance": 0.05}, 0.2),
        ({"operating": "one_error", "tolerance": 0.0}, 0.0),  # 0.94 on the same cases is three errors below 0.95
        ({"operating": "one_error", "tolerance": 0.02}, 0.1),
        ({"price": 0.7}, 0.7),
    ],
)
def test_the_rules_of_the_operating_price(options, price):
    n = 1000
    static = np.stack([np.arange(n) < n * a for a in (0.5, 0.7, 0.9)], 1).astype(float)
    decided = []
    for p, accuracy, rung in ((0.0, 0.95, 2), (0.1, 0.94, 1), (0.2, 0.85, 0)):
        rungs = np.full(n, rung)
        made = Decisions.from_table(p, table(static), rungs, np.zeros(n))
        decided.append(replace(made, score=(np.arange(n) < n * accuracy).astype(float)))
    bootstrap = Bootstrap([str(i) for i in range(n)], resamples=100)
    found = operating_price(decided, table(static), EvaluationOptions(**options), bootstrap, options.get("price"))
    assert found["price"] == price
    assert [row["price"] for row in found["val"]] == [0.0, 0.1, 0.2]
    assert found["rule"] == ("price" if "price" in options else options["operating"])


class Fixed(Allocator):
    """Chooses the middle budget; dearer to decide at a high price."""

    form = "fixed"

    def __init__(self):
        data = SimpleNamespace(run=SimpleNamespace(ladder=list(BUDGETS), allocator=AllocatorOptions()))
        super().__init__(TrainedRun(data, None, None))

    def choose(self, cases, price):
        return np.ones(len(cases), int), np.full(len(cases), 1.0 + (price > 0.1))

    def decide(self, split, price):
        raise NotImplementedError


def test_what_was_timed_is_kept_beside_the_tables(make_performer, cases, tmp_path):
    decider, performer = Fixed(), make_performer()
    run = decider.data.run
    many = [cases[i % len(cases)] for i in range(4)]

    def timed(prices, text="x"):
        decided = [
            Decisions(p, *(np.ones(4, int), np.ones(4), np.ones(4), np.ones(4)), decider.choose(many, p)[1])
            for p in prices
        ]
        nothing = np.zeros((4, 3))
        answered = ScoreTable(
            [c.id for c in many], ["p"] * 4, ["q"] * 4, BUDGETS, *[nothing] * 6, text=[[text] * 3] * 4
        )
        return measured_once(performer, decider, many, decided, 4, answered, tmp_path)

    first, again = timed([0.0, 0.2]), timed([0.0, 0.05, 0.2, 0.3])
    np.testing.assert_equal(again.answer, first.answer)
    np.testing.assert_equal([again.look[p] for p in (0.0, 0.05, 0.2, 0.3)], [first.look[p] for p in (0, 0, 0.2, 0.2)])
    run.allocator = AllocatorOptions(width=8)
    other = timed([0.0])
    np.testing.assert_equal(other.answer, first.answer)
    assert (other.look[0.0] != first.look[0.0]).any(), "another allocator is timed anew"
    run.allocator = AllocatorOptions()
    np.testing.assert_equal(timed([0.0]).look[0.0], first.look[0.0])
    assert (timed([0.0], "other answers").answer[1] != first.answer[1]).any()


@pytest.mark.slow
def test_answers_and_deciding_are_timed_apart(make_performer, cases):
    decider = Fixed()
    many = [cases[i % len(cases)] for i in range(40)]
    decided = [
        Decisions(p, *(np.ones(40, int), np.ones(40), np.ones(40), np.ones(40)), decider.choose(many, p)[1])
        for p in (0.0, 0.05, 0.2)
    ]
    found = measure(make_performer(), decider, many, decided, 4)
    assert set(found.answer) == set(BUDGETS) and {len(t) for t in found.answer.values()} == {TIMED}
    assert found.look[0.0] is found.look[0.05], "as dear at both prices, so timed once"
    assert found.look[0.2] is not found.look[0.0]
    told = found.to_dict(0.2)
    for row in (*told["answer"].values(), told["look"]):
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
    assert found.deciding(0.2) < found.budgets(BUDGETS).min(), "looking nothing up is quicker than an answer"
