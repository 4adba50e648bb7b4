import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.cost import birr, linear, linear_cost, log, log_cost, multiplicative, multiplicative_cost, parse_budget
from rewards.cost import threshold as threshold_reward
from rewards.registry import RewardError, get_reward
from slides.errors import InputError

NAN = math.nan
unit = st.floats(0, 1)


@pytest.mark.parametrize(
    ("native", "text", "score", "expected"),
    [
        (2142, "128", 1.0, 1.0),
        (2142, "255", 0.8, 0.8),
        (2142, "256", 1.0, 0.5),
        (2142, "4000", 1.0, 0.5),
        (100, "99", 1.0, 1.0),
        (100, "100", 1.0, 0.5),
        (2142, "12 or 300", 1.0, 1.0),
        (2142, "1", 1.0, 0.0),
        (2142, "many", 1.0, 0.0),
        (2142, None, 1.0, 0.0),
        (2142, "", 1.0, 0.0),
    ],
)
def test_published_vectors(native, text, score, expected):
    assert birr(text, native, score) == expected


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
    "multiplicative": lambda s, n, cap, price: multiplicative(s, n / cap, price),
    "log": lambda s, n, cap, price: log(s, n, cap, price, 4.0),
    "threshold": lambda s, n, cap, price: threshold_reward(s, n, cap),
}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("linear", [0.9, 0.6, -0.4]), ("multiplicative", [0.9, 0.6, 0.0]), ("threshold", [1.0, 0.5, 0.0]),
     ("log", [1 - 0.4 * 2 / 4, 0.6, -0.4])],
)  # fmt: skip
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


@pytest.mark.filterwarnings("error")
def test_log_without_a_choice_is_free():
    assert log(1.0, 4.0, 4.0, 0.3, 4.0) == 1.0
    assert log(1.0, np.array([0.0, 1.0, 4.0, 900.0]), 64.0, 0.3, 4.0).tolist() == pytest.approx([1, 1, 1, 0.7])


RIGHT, WRONG, SILENT = "<answer>a</answer>", "<answer>b</answer>", "a"
ROW = {"answer": ["a"] * 3, "options": [["a", "b"]] * 3, "task": ["choice"] * 3}


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("linear_cost", {"price": 0.4}, [-0.1, -0.1, -0.4]),
        ("linear_cost", {"price": 0.4, "score": "choice"}, [0.9, -0.1, -0.4]),
        ("multiplicative_cost", {"price": 0.4, "score": "choice"}, [0.9, 0.0, 0.0]),
        ("log_cost", {"price": 0.4, "score": {"name": "choice"}, "n_min": 16}, [0.8, -0.2, -0.4]),
    ],
)
def test_reward_form(name, params, expected):
    reward = get_reward({"name": name, "params": params})
    tokens, budget, most = [64, 64, 64], [100] * 3, [256] * 3
    assert reward([RIGHT, WRONG, SILENT], tokens=tokens, budget=budget, max_budget=most, **ROW) == pytest.approx(
        expected
    )
    assert reward([RIGHT, WRONG, SILENT], budget=tokens, max_budget=most, **ROW) == pytest.approx(expected)
    nones = [None, NAN, None]
    assert reward([RIGHT, WRONG, SILENT], tokens=nones, budget=tokens, max_budget=most, **ROW) == pytest.approx(
        expected
    )


def test_reward_form_without_a_budget_or_a_score_does_not_apply():
    assert linear_cost([RIGHT] * 4, max_budget=[None, 64, 0, "64"], tokens=[4, None, 4, 4]) == [None] * 4
    assert log_cost([RIGHT], max_budget=[64]) == [None]
    columns = ROW | {"task": ["open"] * 3}
    assert multiplicative_cost([RIGHT] * 3, [64] * 3, "choice", tokens=[4] * 3, **columns) == [None] * 3


def test_more_realised_than_the_largest_budget_costs_the_largest():
    assert linear_cost([RIGHT], max_budget=[64], tokens=[70], price=1.0) == [-1.0]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="price"):
        linear_cost([RIGHT], max_budget=[64], tokens=[4], price=-1.0)
    with pytest.raises(RewardError, match="'score'"):
        get_reward("multiplicative_cost")([RIGHT], max_budget=[64], tokens=[4])
    with pytest.raises(InputError, match="did you mean 'choice'"):
        linear_cost([RIGHT], max_budget=[64], tokens=[4], score="choise")
