"""Areas between frontiers, cost at equal accuracy, accuracy at equal cost, of tables whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from frugalpath.bootstrap import Bootstrap
from frugalpath.evaluation.frontier import (
    Frontier,
    Paid,
    area_of_chosen,
    areas,
    at_operating_point,
    hull,
    hypervolume,
    lost_to_best,
    pareto,
)

N = 40
BOOTSTRAP = Bootstrap([f"p{i // 2}" for i in range(N)], resamples=60)

points = st.integers(1, 8).flatmap(
    lambda n: st.tuples(arrays(float, n, elements=st.floats(1, 100)), arrays(float, n, elements=st.floats(0, 1)))
)


def paid(score: list[float], cost: list[float]) -> Paid:
    """Settings of which every case has the same score and cost."""
    return Paid(np.tile(np.array(score, float), (N, 1)), np.tile(np.array(cost, float), (N, 1)))


def planted(seed: int, settings_: int = 4) -> Paid:
    """Noisy cases: dearer settings are better, and one setting's cost differs between cases."""
    rng = np.random.default_rng(seed)
    rate = np.sort(rng.random(settings_))
    cost = np.sort(rng.uniform(1, 10, settings_)) * rng.uniform(0.9, 1.1, (N, 1))
    return Paid((rng.random((N, settings_)) < rate).astype(float), cost)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [False, True])
def test_points_of_equal_cost_leave_the_mean_defined(log):
    twice = Frontier(np.array([0.1, 0.3, 0.3, 0.6]), np.array([0.2, 0.5, 0.5, 0.7]), True)
    once = Frontier(np.array([0.1, 0.3, 0.6]), np.array([0.2, 0.5, 0.7]), True)
    assert twice.mean(0.1, 1.0, log) == pytest.approx(once.mean(0.1, 1.0, log))


@given(points)
def test_frontiers_are_what_the_points_buy(found):
    cost, accuracy = found
    at = np.linspace(0.5, 120, 300)
    step = np.array([accuracy[cost <= c].max(initial=-1) for c in at])
    front = Frontier.of(cost, accuracy, mixed=False)
    np.testing.assert_array_equal(np.nan_to_num(front.at(at), nan=-1), step)
    # The best of all mixtures of two points with that mean cost or less.
    line = np.full(len(at), -1.0)
    for a, s in zip(cost, accuracy, strict=True):
        line = np.where(at >= a, np.maximum(line, s), line)
        for b, t in zip(cost, accuracy, strict=True):
            if a < b:
                share = (at - a) / (b - a)
                line = np.where((share >= 0) & (share <= 1), np.maximum(line, s + share * (t - s)), line)
    mixed = np.nan_to_num(Frontier.of(cost, accuracy, mixed=True).at(at), nan=-1)
    np.testing.assert_allclose(mixed, line, atol=1e-9)
    assert (mixed >= step - 1e-12).all(), "to mix never buys less"


@given(points, st.booleans(), st.booleans())
def test_the_mean_of_a_frontier_is_its_integral(found, mixed, log):
    front = Frontier.of(*found, mixed=mixed)
    low, high = front.cost[0], 130.0
    ends = np.geomspace(low, high, 20001) if log else np.linspace(low, high, 20001)
    middle = np.sqrt(ends[1:] * ends[:-1]) if log else (ends[1:] + ends[:-1]) / 2
    assert front.mean(low, high, log) == pytest.approx(np.nanmean(front.at(middle)), abs=1e-3)


def test_means_of_known_shapes():
    cost, accuracy = np.array([1.0, 3.0]), np.array([0.5, 0.9])
    assert Frontier.of(cost, accuracy, False).mean(1, 5) == pytest.approx(0.7)
    assert Frontier.of(cost, accuracy, True).mean(1, 5) == pytest.approx((2 * 0.7 + 2 * 0.9) / 4)
    assert Frontier.of(cost, accuracy, False).mean(1, 9, log=True) == pytest.approx(0.7), "3 is the middle of 1 and 9"
    # The integral of 0.3 + 0.2 c over log c, from 1 to 3, is 0.3 log 3 + 0.4.
    assert Frontier.of(cost, accuracy, True).mean(1, 3, log=True) == pytest.approx(0.3 + 0.4 / np.log(3))
    assert np.isnan(Frontier.of(cost, accuracy, True).mean(0.5, 3)), "nothing is that cheap"
    assert np.isnan(Frontier.of(cost, accuracy, True).mean(3, 3))


@given(points)
def test_the_hull_is_part_of_the_pareto_points(found):
    cost, accuracy = found
    corners, best = hull(cost, accuracy), pareto(cost, accuracy)
    assert set(corners) <= set(best)
    assert corners[0] == best[0] and corners[-1] == best[-1]
    assert (np.diff(accuracy[best]) > 0).all() and (np.diff(cost[best]) > 0).all()


@given(points)
def test_the_hypervolume_is_the_area_under_the_best_accuracy(found):
    cost, accuracy = found
    largest, steps = 70.0, 20000
    budget = (np.arange(steps) + 0.5) / steps * largest
    best = np.zeros(steps)
    for c, a in zip(cost, accuracy, strict=True):
        best = np.maximum(best, np.where(budget >= c, a, 0))
    assert hypervolume(cost, accuracy, largest) == pytest.approx(best.mean(), abs=len(cost) / steps + 1e-9)


def test_areas_of_planted_tables():
    static = paid([0.5, 0.9], [1, 3])
    found = areas(paid([0.8, 0.9], [1, 2]), static, BOOTSTRAP)
    # Adaptive: 0.8 to 0.9 over 1..2, 0.9 over 2..3; static: 0.5 to 0.9.
    assert found["mixed"]["linear"]["value"] == pytest.approx((0.85 + 0.9) / 2 - 0.7)
    assert found["mixed"]["linear"]["ci95"] == pytest.approx([0.175, 0.175])
    assert found["step"]["linear"]["value"] == pytest.approx((0.8 + 0.9) / 2 - 0.5)
    assert found["range"] == pytest.approx([1 / 3, 1])
    volume = found["hypervolume"]
    assert volume["adaptive"]["value"] == pytest.approx((0.8 + 0.9) / 3)
    assert volume["static"]["value"] == pytest.approx(0.5 * 2 / 3)
    assert volume["difference"]["value"] == pytest.approx(1.7 / 3 - 1 / 3)


def test_there_is_no_area_without_a_common_range():
    found = areas(paid([0.9], [5]), paid([0.5, 0.9], [1, 3]), BOOTSTRAP)
    assert found["range"] is None and found["mixed"]["linear"] == {"value": None, "ci95": None}
    assert found["hypervolume"]["adaptive"]["value"] == 0


@pytest.mark.slow
@given(st.integers(0, 10**6), st.floats(0.01, 0.3), st.floats(0.5, 0.99))
def test_a_frontier_equals_itself_and_a_better_or_cheaper_one_is_above(seed, gain, cheaper):
    static = planted(seed)
    assume(len(pareto(*static.means())) > 1)
    same = areas(static, static, BOOTSTRAP)
    for form in ("mixed", "step"):
        for scale in ("linear", "log"):
            assert same[form][scale] == {"value": 0, "ci95": [0, 0]}
    better = areas(Paid(static.score + gain, static.cost), static, BOOTSTRAP)
    assert better["mixed"]["linear"]["value"] == pytest.approx(gain)
    assert better["step"]["log"]["ci95"] == pytest.approx([gain, gain])
    saving = areas(Paid(static.score, static.cost * cheaper), static, BOOTSTRAP)
    assert saving["mixed"]["linear"]["value"] > 0 and saving["mixed"]["linear"]["ci95"][0] >= 0
    assert saving["hypervolume"]["difference"]["value"] > 0


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_a_further_setting_never_lowers_a_frontier(seed, left_out):
    whole = planted(seed)
    keep = [k for k in range(4) if k != left_out]
    part = Paid(whole.score[:, keep], whole.cost[:, keep])
    for mixed in (True, False):
        more, less = (Frontier.of(*p.means(), mixed=mixed) for p in (whole, part))
        at = np.linspace(less.cost[0] * (1 + 1e-9), 12, 50)  # means differ by rounding
        assert (more.at(at) >= less.at(at) - 1e-9).all()


def test_an_operating_point_against_static_budgets():
    static = paid([0.5, 0.7, 0.9], [1, 2, 4])
    found = at_operating_point(paid([0.7], [1.5]), static, [8, 16, 32], BOOTSTRAP, np.full(N, 0.3))
    assert (found["cost"], found["stage1"], found["largest"]) == pytest.approx((1.5, 0.3, 4))
    assert found["cost_share"]["value"] == pytest.approx(0.375) and found["stage1_share"] == pytest.approx(0.075)
    step = found["equal_accuracy"]["step"]
    assert (step["budget"], step["cost"], step["cost_share"]["value"], step["reached"]) == (16, 2, 0.75, 1)
    assert found["equal_accuracy"]["mixed"]["cost"] == pytest.approx(2)
    assert found["equal_cost"]["accuracy"] == pytest.approx(0.6)
    assert found["equal_cost"]["gain"]["value"] == pytest.approx(0.1)
    between = at_operating_point(paid([0.8], [1.5]), static, [8, 16, 32], BOOTSTRAP, np.zeros(N))["equal_accuracy"]
    assert between["step"]["budget"] == 32 and between["step"]["cost_share"]["value"] == pytest.approx(1.5 / 4)
    assert between["mixed"]["cost"] == pytest.approx(3) and between["mixed"]["cost_share"]["value"] == pytest.approx(
        0.5
    )


def test_an_accuracy_that_no_static_budget_reaches():
    static = paid([0.5, 0.7], [1, 2])
    found = at_operating_point(paid([0.8], [0.9]), static, [8, 16], BOOTSTRAP, np.zeros(N))
    for form in ("step", "mixed"):
        equal = found["equal_accuracy"][form]
        assert equal["cost"] is None and equal["cost_share"]["value"] is None and equal["reached"] == 0
    assert found["equal_cost"]["accuracy"] is None, "no static budget is that cheap either"
    worse = Paid(static.score[:, :1] - 0.2, static.cost[:, :1] + 0.5)
    equal = at_operating_point(worse, static, [8, 16], BOOTSTRAP, np.zeros(N))["equal_accuracy"]["step"]
    assert equal["budget"] == 8 and equal["cost_share"]["value"] == pytest.approx(1.5), "dearer than what is as good"


def test_what_is_lost_to_the_best_budget():
    score = np.tile([0.2, 0.9, 0.6], (N, 1))
    assert lost_to_best(np.full(N, 0.7), score, BOOTSTRAP) == {
        "value": pytest.approx(0.2),
        "ci95": pytest.approx([0.2, 0.2]),
    }


@pytest.mark.slow
def test_intervals_cover_the_area_of_the_population():
    """Three settings a side, 60 data sets of 100 cases: the area with points chosen beforehand has no bias."""
    rates, cost = np.array([0.5, 0.7, 0.8]), np.array([1.0, 2.0, 4.0])
    own_cost = np.array([1.1, 2.1, 4.0])
    kept = (np.arange(3), np.arange(3))
    truth = areas(paid([0.6, 0.75, 0.8], list(own_cost)), paid(list(rates), list(cost)), BOOTSTRAP)
    inside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        luck = rng.random((100, 1))
        bootstrap = Bootstrap([str(i) for i in range(100)], resamples=200, seed=seed)
        static, own = (
            Paid((luck + rng.normal(0, 0.1, (100, 3)) < r).astype(float), np.tile(c, (100, 1)))
            for r, c in ((rates, cost), (np.array([0.6, 0.75, 0.8]), own_cost))
        )
        low, high = area_of_chosen(own, static, kept, bootstrap)["linear"]["ci95"]
        inside.append(low <= truth["mixed"]["linear"]["value"] <= high)
    assert np.mean(inside) > 0.85


@pytest.mark.slow
def test_random_mixtures_do_not_pass_for_an_allocator():
    """Thirteen mixtures of five budgets that nothing chose: chosen on 600 cases and tested on 1,000, 40 data sets."""
    cost, rate = np.array([0.1, 0.14, 0.3, 0.5, 1.0]), np.array([0.7, 0.8, 0.88, 0.93, 0.96])
    above = []
    for seed in range(40):
        rng = np.random.default_rng(seed)

        def draw(n: int, rng: np.random.Generator = rng) -> tuple[Paid, Paid]:
            score = (0.6 * rng.random((n, 1)) + 0.4 * rng.random((n, 5)) < rate).astype(float)
            places = np.linspace(0.05, 3.95, 13)
            rungs = places.astype(int) + (rng.random((n, 13)) < places % 1)
            static = Paid(score, np.tile(cost, (n, 1)))
            return Paid(np.take_along_axis(score, rungs, 1), cost[rungs]), static

        (own, static), (tested, fixed) = draw(600), draw(1000)
        kept = hull(*own.means()), hull(*static.means())
        bootstrap = Bootstrap([str(i) for i in range(1000)], resamples=200, seed=seed)
        above.append(area_of_chosen(tested, fixed, kept, bootstrap)["linear"]["ci95"][0] > 0)
    assert np.mean(above) <= 0.1
