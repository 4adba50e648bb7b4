from __future__ import annotations

import numpy as np
import pytest

from frugalpath.allocator.cascade_plan import ENOUGH, Experience, Plan, best_plan, best_threshold, stop_when_sure, walk
from frugalpath.allocator.forecast import Forecast, Observations, common_answers, fit_forecast, fit_forecast_by_patient

FRESH = np.array([1.0, 3.0, 10.0])
"""FLOPs of an answer at each rung; a look before it saves half a unit."""
COST = np.vstack([FRESH, *[np.where(np.arange(3) == j, 0.0, FRESH - 0.5) for j in range(3)]])


def world(count: int = 600, seed: int = 0) -> tuple[Observations, np.ndarray]:
    """Easy cases, which every rung solves and is sure of; hard ones, which the last rung solves and the others guess
    with little confidence; hopeless ones of a kind of their own, which are sure of a wrong answer."""
    rng = np.random.default_rng(seed)
    easy, hopeless = rng.random(count) < 0.5, rng.random(count) < 0.25
    score = np.stack([easy, easy, np.ones(count, dtype=bool)], 1) & ~hopeless[:, None]
    sure = np.where((easy | hopeless)[:, None], 0.95, 0.5) + rng.uniform(-0.04, 0.04, (count, 3))
    text = [["a", "a", "a"] if e or h else ["a", "b", "c"] for e, h in zip(easy, hopeless, strict=True)]
    kinds = ["colour" if h else "shape" for h in hopeless]
    return Observations.of(sure, text, kinds), score.astype(float)


def patients(count: int) -> list[str]:
    return [f"p{i // 2}" for i in range(count)]


@pytest.fixture(scope="module")
def fitted() -> tuple[Forecast, np.ndarray]:
    seen, score = world()
    return fit_forecast_by_patient(seen, score, patients(len(score)))


def test_forecasts_follow_what_was_seen(fitted):
    forecast, fold = fitted
    seen, score = world(seed=1)
    last = np.full(len(score), fold.max() + 1)
    looked = np.tile([True, False, False], (len(score), 1))
    expected = forecast.expected(seen, 0, looked, last)
    assert expected.shape == score.shape
    for rung in range(3):
        for group in np.unique(score[:, 0] * 2 + (seen.questions == "colour")):
            here = (score[:, 0] * 2 + (seen.questions == "colour")) == group
            assert expected[here, rung].mean() == pytest.approx(score[here, rung].mean(), abs=0.12)
    assert forecast.flops == 2 * 3 * (forecast.weights.shape[-1] + forecast.kept.shape[-1])


def test_a_fit_that_has_not_seen_a_patient_does_not_hang_on_it():
    seen, score = world(60)
    before, fold = fit_forecast_by_patient(seen, score, patients(60))
    held = fold == 0
    changed = np.where(held[:, None], 1 - score, score)
    after, again = fit_forecast_by_patient(seen, changed, patients(60))
    assert (fold == again).all() and len(set(fold)) == 5 and len(before.weights) == 6
    assert {p for p, f in zip(patients(60), fold, strict=True) if f == 0}.isdisjoint(
        p for p, f in zip(patients(60), fold, strict=True) if f
    )
    np.testing.assert_array_equal(before.weights[0], after.weights[0])
    for other in (1, 2, 3, 4, 5):
        assert not np.array_equal(before.weights[other], after.weights[other])


def test_what_was_not_asked_is_not_read(fitted):
    forecast, _ = fitted
    seen, _ = world(40, seed=2)
    unknown = Observations(seen.confidence.copy(), seen.text.copy(), seen.questions)
    unknown.confidence[:, 2], unknown.confidence[:, 1] = np.nan, np.nan
    unknown.text[:, 1:] = "z"
    looked = np.tile([True, False, False], (40, 1))
    fold = np.full(40, 5)
    np.testing.assert_array_equal(
        forecast.expected(seen, 0, looked, fold), forecast.expected(unknown, 0, looked, fold)
    )


@pytest.mark.parametrize("jump", [True, False])
def test_only_what_a_later_rung_solves_goes_on(fitted, jump):
    forecast, _ = fitted
    seen, score = world(seed=1)
    fold = np.full(len(score), 5)
    flops = np.tile(COST, (len(score), 1, 1))
    rungs, spent, looked = walk(Plan(0, jump), forecast, seen, fold, flops, COST / 10, 0.3)
    hard = (score[:, 2] == 1) & (score[:, 0] == 0)
    np.testing.assert_array_equal(rungs, np.where(hard, 2, 0))
    own = forecast.flops
    looks = COST[0, 0] + own + (COST[1, 2] if jump else COST[1, 1] + own + COST[2, 2])
    np.testing.assert_allclose(spent[~hard], COST[0, 0] + own)
    np.testing.assert_allclose(spent[hard], looks)
    assert looked[hard].tolist() == [[True, not jump, True]] * hard.sum()
    assert looked[~hard].tolist() == [[True, False, False]] * (~hard).sum()


def test_nobody_goes_on_at_a_high_price_and_everybody_may_at_none(fitted):
    forecast, _ = fitted
    seen, score = world(seed=1)
    fold, flops = np.full(len(score), 5), np.tile(COST, (len(score), 1, 1))
    assert (walk(Plan(0, True), forecast, seen, fold, flops, COST / 10, 5.0)[0] == 0).all()
    assert (walk(Plan(2, True), forecast, seen, fold, flops, COST / 10, 0.0)[0] == 2).all()
    dear = [walk(Plan(0, True), forecast, seen, fold, flops, COST / 10, p)[1].mean() for p in (0.0, 0.1, 0.4, 1.0)]
    assert dear == sorted(dear, reverse=True)


def test_every_look_on_the_way_is_paid_for():
    """One step at a time, a gain of 0.5 at the last rung is worth 0.25 + 0.95 of the largest budget, straight 0.95."""
    expected = np.array([[0.4, 0.4, 0.9]])
    for jump, border in ((False, 0.5 / 1.2), (True, 0.5 / 0.95)):
        plan = Plan(0, jump)
        assert plan.move(expected, 0, COST / 10, border - 0.01) == (2 if jump else 1)
        assert plan.move(expected, 0, COST / 10, border + 0.01) == 0


def test_the_best_plan_is_the_best_on_its_cases(fitted):
    forecast, fold = fitted
    seen, score = world()
    flops = np.tile(COST * 1e6, (len(score), 1, 1))
    for price in (0.0, 0.3, 20.0):
        plan = best_plan(forecast, seen, fold, score, flops, COST / 10, price, 1e7)

        def worth(start: int, jump: bool, price: float = price) -> float:
            rungs, spent, _ = walk(Plan(start, jump), forecast, seen, fold, flops, COST / 10, price)
            return (score[np.arange(len(score)), rungs] - price * spent / 1e7).mean()

        own = worth(plan.start, plan.jump)
        assert own == max(worth(s, j) for s in range(3) for j in (True, False))
        assert own >= max((score[:, k] - price * (FRESH[k] * 1e6 + forecast.flops) / 1e7).mean() for k in range(3))
    assert plan.start == 0


def test_without_training_it_stops_at_the_first_rung_that_is_sure():
    confidence = np.array([[0.9, 0.1, 0.1], [0.2, 0.8, 0.1], [0.2, 0.3, 0.1]])
    flops = np.tile(COST, (3, 1, 1))
    rungs, spent = stop_when_sure(confidence, flops, 0.75)
    assert rungs.tolist() == [0, 1, 2]
    assert spent.tolist() == [1.0, 1.0 + 2.5, 1.0 + 2.5 + 9.5]
    assert (stop_when_sure(confidence, flops, np.inf)[0] == 2).all()
    rungs, spent = stop_when_sure(confidence, flops, 0.75, start=1)
    assert rungs.tolist() == [2, 1, 2] and spent.tolist() == [3.0 + 9.5, 3.0, 3.0 + 9.5]


def test_the_best_threshold_parts_sure_from_unsure():
    seen, score = world()
    flops = np.tile(COST, (len(score), 1, 1))
    threshold, start = best_threshold(seen.confidence, score, flops, 0.2, 10.0)
    assert 0.54 < threshold < 0.93 and start == 0
    assert best_threshold(seen.confidence, score, flops, 20.0, 10.0) == (0.0, 0)


def test_a_kind_that_a_fold_lacks_is_no_error():
    seen, score = world(30)
    seen.questions[:] = "shape"
    seen.questions[:2] = "rare"
    forecast, fold = fit_forecast_by_patient(seen, score, patients(30))
    assert np.isfinite(forecast.weights).all()
    unknown = Observations(seen.confidence, seen.text, np.array(["new"] * 30))
    looked = np.tile([True, False, False], (30, 1))
    assert np.isfinite(forecast.expected(unknown, 0, looked, fold)).all()
    assert fit_forecast(seen, score, ["shape"], ["shape: a"]).weights.shape[0] == 1


def test_an_answer_that_is_often_wrong_makes_it_go_on():
    """Of two answers given with equal confidence one is always right, the other at the last rung alone."""
    rng = np.random.default_rng(0)
    wrong = rng.random(400) < 0.5
    score = np.stack([~wrong, ~wrong, np.ones(400, dtype=bool)], 1).astype(float)
    text = [["no", "no", "yes"] if w else ["yes"] * 3 for w in wrong]
    seen = Observations.of(np.full((400, 3), 0.8), text, ["shape"] * 400)
    assert common_answers(seen) == ["shape: no", "shape: yes"] and common_answers(seen, 401) == []
    forecast, fold = fit_forecast_by_patient(seen, score, patients(400))
    flops = np.tile(COST, (400, 1, 1))
    rungs, *_ = walk(Plan(0, True), forecast, seen, fold, flops, COST / 10, 0.3)
    np.testing.assert_array_equal(rungs, np.where(wrong, 2, 0))


def test_a_kind_of_question_has_a_plan_of_its_own_where_there_are_enough():
    """One kind is right at once, the other with the last rung alone: one start for both would lose on either."""
    n = 2 * ENOUGH
    easy = np.arange(n) % 2 == 0
    score = np.stack([easy, easy, np.ones(n, dtype=bool)], 1).astype(float)
    kinds = ["easy" if e else "hard" for e in easy]
    seen = Observations.of(np.full((n, 3), 0.8), [["same"] * 3] * n, kinds)
    forecast, fold = fit_forecast_by_patient(seen, score, patients(n))
    flops = np.tile(COST * 1e6, (n, 1, 1))
    known = Experience(forecast, fold, seen, score, flops)
    assert set(known.kinds) == {"easy", "hard"} and known.about("other") is known
    assert [known.about(kind).plan(0.3).start for kind in ("easy", "hard")] == [0, 2]
    assert known.about("hard").largest == known.largest
    few = Experience(forecast, fold[:-2], seen.at(np.arange(n - 2)), score[:-2], flops[:-2])
    assert few.kinds == {} and few.about("hard") is few


def test_the_answer_that_is_most_likely_right_is_kept():
    """The first rung is right where it is sure, the last where the first was not, and the last is never unsure."""
    rng = np.random.default_rng(0)
    first = rng.random(600) < 0.5
    score = np.stack([first, first, ~first], 1).astype(float)
    sure = np.stack([np.where(first, 0.99, 0.4), np.where(first, 0.99, 0.4), np.full(600, 0.9)], 1)
    seen = Observations.of(sure, [["a", "a", "b"]] * 600, ["shape"] * 600)
    forecast, fold = fit_forecast_by_patient(seen, score, patients(600))
    everything = np.ones((600, 3), dtype=bool)
    assert (score[np.arange(600), forecast.best(seen, everything, fold)] == 1).all()
    alone = np.tile([False, True, False], (600, 1))
    np.testing.assert_array_equal(forecast.best(seen, alone, fold), 1)
    unseen = Observations(np.where(alone, sure, np.nan), seen.text, seen.questions)
    np.testing.assert_array_equal(forecast.best(unseen, alone, fold), 1)
    flops = np.tile(COST * 1e6, (600, 1, 1))
    rungs, *_ = walk(Plan(0, False), forecast, seen, fold, flops, COST / 10, 0.0)
    assert (score[np.arange(600), rungs] == 1).all(), "though it may go on where the first was right"
