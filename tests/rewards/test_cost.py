import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.rewards.cost import birr, dual_price, linear, parse_budget, visionthink
from frugalpath.rewards.cost import threshold as threshold_reward

NAN = math.nan
unit = st.floats(0, 1)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("128", 128),
        (" 128 tokens.", 128),
        ("n=64", 64),
        ("1 or 300", 300),
        ("0128", 128),
        ("2", 2),
        ("64-128", 64),
        ("12.", 12),
        ("1", None),
        ("0", None),
        ("-5", None),
        ("12.5", None),
        ("1,024", None),
        ("1.024", None),
        ("256x256", None),
        ("x256", None),
        ("١٢٨", None),
        ("12345678", None),
        ("1" * 1_000_000, None),
    ],
)
def test_parse_budget(text, budget):
    assert parse_budget(text) == budget


PRESETS = {
    "linear": lambda s, n, cap, price: linear(s, n / cap, price),
    "threshold": lambda s, n, cap, price: threshold_reward(s, n, cap),
}
READABLE = PRESETS | {
    "dual": lambda s, n, cap, price: linear(s, n / cap, dual_price(price, [0.9], target=0.5)),
    "birr": lambda s, n, cap, price: birr(None if math.isnan(n) else str(round(n) + 2), int(cap), s),
}


@pytest.mark.parametrize("preset", READABLE)
@given(unit, unit, st.floats(0.01, 64), st.floats(0, 2))
def test_an_unreadable_output_never_beats_a_readable_one(preset, score, other, tokens, price):
    value, unreadable = (float(READABLE[preset](s, n, 64.0, price)) for s, n in ((score, tokens), (other, NAN)))
    assert unreadable <= value + 1e-12


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("linear", [0.9, 0.6, -0.4]), ("threshold", [1.0, 0.5, 0.0])],
)
@pytest.mark.parametrize("library", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_values(preset, expected, library):
    values = PRESETS[preset](library([1.0, 1.0, 1.0]), library([16.0, 64.0, NAN]), 64.0, 0.4)
    assert type(values) is type(library([0.0]))
    assert values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("preset", PRESETS)
@given(unit, st.floats(0.01, 64), st.floats(0, 2))
def test_unreadable_is_the_worst_and_cost_never_pays(preset, score, tokens, price):
    value = PRESETS[preset](score, tokens, 64.0, price)
    worst = PRESETS[preset](1.0, NAN, 64.0, price)
    assert worst <= value + 1e-12
    assert worst <= PRESETS[preset](0.0, 64.0, 64.0, price) + 1e-12
    assert value <= score + 1e-12
    assert PRESETS[preset](score, 64.0, 64.0, price) <= value + 1e-12


@pytest.mark.parametrize("preset", PRESETS)
@given(st.lists(st.tuples(unit, st.floats(1, 64) | st.just(NAN)), min_size=1, max_size=5))
def test_scalar_numpy_and_torch_agree(preset, rows):
    scores, tokens = (np.array(column) for column in zip(*rows, strict=True))
    single = [float(PRESETS[preset](float(s), float(n), 64.0, 0.3)) for s, n in rows]
    np.testing.assert_allclose(PRESETS[preset](scores, tokens, 64.0, 0.3), single)
    tensors = PRESETS[preset](torch.from_numpy(scores), torch.from_numpy(tokens), 64.0, 0.3)
    np.testing.assert_allclose(tensors.numpy(), single)
    mixed = PRESETS[preset](torch.from_numpy(scores), 16.0, 64.0, 0.3)
    np.testing.assert_allclose(mixed.numpy(), PRESETS[preset](scores, 16.0, 64.0, 0.3))


def test_one_table_serves_every_price():
    scores, costs = torch.rand(5, 4), torch.tensor([0.1, 0.2, 0.5, 1.0])
    prices = torch.tensor([0.0, 0.5])
    values = linear(scores, costs, prices[:, None, None])
    assert values.shape == (2, 5, 4)
    torch.testing.assert_close(values[0], scores)
    torch.testing.assert_close(values[1], scores - 0.5 * costs)


def test_linear_is_not_clipped_and_charges_the_worst_cost():
    assert linear(1.0, 1.7, 0.5) == pytest.approx(0.15)  # several looks may cost more than the largest budget
    assert linear(1.0, NAN, 0.5, worst_cost=2.0) == -1.0


def test_a_row_that_cannot_be_scored_stays_nan():
    assert math.isnan(linear(NAN, 0.5, 0.3))
    assert linear(NAN, NAN, 0.3) == pytest.approx(-0.3)


def test_gradients_pass_beside_an_unreadable_row():
    scores = torch.tensor([1.0, 0.5], requires_grad=True)
    costs = torch.tensor([0.5, NAN], requires_grad=True)
    linear(scores, costs, 0.4).sum().backward()
    assert scores.grad.tolist() == [1.0, 0.0]
    assert costs.grad.tolist() == pytest.approx([-0.4, 0.0])


def look(scores, forms, highs, **options):
    """`visionthink` of one group, by numpy and by torch."""
    values = visionthink(np.array(scores), np.array(forms), np.array(highs), **options)
    tensors = visionthink(*(torch.tensor(v, dtype=torch.float64) for v in (scores, forms, highs)), **options)
    np.testing.assert_allclose(tensors.numpy(), values)
    return values.tolist()


@pytest.mark.parametrize(
    ("scores", "highs", "expected"),
    [
        # r = 1/5 is not below theta: who looked closely pays
        ([1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [1, 0.9, 0.9, 0.9, 0.9, 0]),
        # r = 1/6: the one cheap hit is luck, and cheap looks pay, wrong ones too
        ([1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0], [0.9, 1, 1, 1, 1, 1, -0.1]),
        ([0, 1], [0, 1], [-0.1, 1.0]),  # r = 0
        ([1, 0], [0, 1], [1.0, -0.1]),  # r = 1
        ([0, 0, 0], [0, 1, 1], [0, 0, 0]),  # r is not defined: nobody pays
        ([0, 0], [0, NAN], [0, -0.1]),  # but an unreadable output does
        ([1, NAN, 1], [0, 0, NAN], [1, NAN, -0.1]),  # what is unreadable or has no score is not counted as right
    ],
)
def test_visionthink(scores, highs, expected):
    assert look(scores, [0.0] * len(scores), highs) == pytest.approx(expected, nan_ok=True)


def test_visionthink_parameters_and_groups():
    assert look([1.0, 1.0], [1, 0], [0, 1]) == pytest.approx([1.5, 0.9])
    assert look([1.0, 1.0], [1, 0], [0, 1], theta=0.6, penalty=0.3, form_weight=1.0) == pytest.approx([1.7, 1.0])
    assert look([0.6, 0.4], [0, 0], [0, 1], right_from=0.7) == pytest.approx([0.6, 0.4])
    groups = look([[0, 1], [1, 0]], [[0, 0], [0, 0]], [[0, 1], [0, 1]])
    assert groups == [look([0, 1], [0, 0], [0, 1]), look([1, 0], [0, 0], [0, 1])]


@given(st.lists(st.tuples(unit, unit, st.sampled_from([0.0, 1.0, NAN])), min_size=1, max_size=8), st.randoms())
def test_visionthink_treats_a_group_as_a_set_and_unreadable_as_worst(rows, shuffler):
    values = look(*map(list, zip(*rows, strict=True)))
    order = list(range(len(rows)))
    shuffler.shuffle(order)
    shuffled = look(*map(list, zip(*(rows[i] for i in order), strict=True)))
    assert shuffled == pytest.approx([values[i] for i in order])
    for (score, form, high), value in zip(rows, values, strict=True):
        assert -0.1 <= value <= score + 0.5 * form + 1e-12 or math.isnan(high)
        assert not math.isnan(high) or value == pytest.approx(-0.1)


def test_dual_price():
    assert dual_price(0.5, [0.3, 0.5], target=0.2, step=0.1) == pytest.approx(0.52)
    assert dual_price(0.5, [0.3, NAN], target=0.2, step=0.1) == pytest.approx(0.545)
    assert dual_price(0.5, torch.tensor([NAN]), target=0.2, step=0.1, worst_cost=3.0) == pytest.approx(0.78)
    assert dual_price(0.01, [0.0], target=0.5) == 0.0


@given(st.floats(0, 10), st.lists(unit | st.just(NAN), min_size=1, max_size=9), unit, st.floats(0, 5))
def test_dual_price_follows_the_cost(price, cost, target, step):
    new = dual_price(price, cost, target, step)
    mean = np.nan_to_num(cost, nan=1.0).mean()
    assert new >= 0.0
    assert new >= price if mean >= target else new <= price


def test_dual_price_finds_the_budget_at_which_the_mean_cost_is_the_target():
    """Cases with scores that rise with cost, each answered with the budget of the highest value at the price."""
    rng = np.random.default_rng(0)
    budgets = np.linspace(0.01, 1.0, 100)
    scores = 1 - np.exp(-budgets * rng.uniform(1, 10, size=(200, 1)))
    price, costs = 0.0, []
    for _ in range(300):
        costs.append(budgets[linear(scores, budgets, price).argmax(1)])
        price = dual_price(price, costs[-1], target=0.3, step=0.2)
    assert costs[0].mean() == 1.0
    assert costs[-1].mean() == pytest.approx(0.3, abs=0.01)
