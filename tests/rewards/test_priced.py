import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.rewards.priced import birr_cost, dual_cost, linear_cost, visionthink_cost
from frugalpath.rewards.registry import RewardError, get_reward, warn_unscorable

NAN = math.nan

RIGHT, WRONG, SILENT = "<answer>a</answer>", "<answer>b</answer>", "a"
ROW = {"answer": ["a"] * 3, "options": [["a", "b"]] * 3, "task": ["choice"] * 3}


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("linear_cost", {"price": 0.4}, [-0.1, -0.1, -0.4]),
        ("linear_cost", {"price": 0.4, "score": "choice"}, [0.9, -0.1, -0.4]),
        ("linear_cost", {"price": 0.4, "score": {"name": "choice"}}, [0.9, -0.1, -0.4]),
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
    assert linear_cost([RIGHT], max_budget=[64]) == [None]
    columns = ROW | {"task": ["open"] * 3}
    assert linear_cost([RIGHT] * 3, [64] * 3, score="choice", tokens=[4] * 3, **columns) == [None] * 3


def test_more_realised_than_the_largest_budget_costs_the_largest():
    assert linear_cost([RIGHT], max_budget=[64], tokens=[70], price=1.0) == [-1.0]


def test_mistakes_are_named():
    with pytest.raises(InputError, match="price"):
        linear_cost([RIGHT], max_budget=[64], tokens=[4], price=-1.0)
    with pytest.raises(RewardError, match="'score'"):
        get_reward("visionthink_cost")([RIGHT], max_budget=[64], tokens=[4], id=["1"])
    with pytest.raises(InputError, match="did you mean 'choice'"):
        linear_cost([RIGHT], max_budget=[64], tokens=[4], score="choise")


FORM = "<think></think><answer>{}</answer>"


def test_visionthink_cost_compares_the_looks_at_one_case():
    completions = [FORM.format(a) for a in "aabab"] + ["<answer>a</answer>", "a"]
    columns = {"answer": ["a"] * 7, "options": [["a", "b"]] * 7, "id": ["1", "1", "1", "2", "2", 2, "2"]}
    values = visionthink_cost(
        completions, max_budget=[256] * 7, score="choice", tokens=[64, 256, 256, 64, 65, 256, 64], **columns
    )
    # Case 1: half of the right answers are cheap, so dear ones pay. Case 2: as much.
    assert values == pytest.approx([1.5, 1.4, 0.4, 1.5, 0.4, 0.9, -0.1])
    values = visionthink_cost(
        completions, [256] * 7, score="choice", tokens=[64] * 7, low_share=0.2, theta=0.9, penalty=0.2,
        form_weight=0.0, **columns,
    )  # fmt: skip
    assert values == pytest.approx([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, -0.2])  # all looks are dear, and nothing else helps


def test_visionthink_cost_leaves_rows_out_that_have_no_score():
    columns = {"answer": ["a"] * 3, "options": [["a", "b"]] * 3, "task": ["choice", "open", "choice"]}
    values = visionthink_cost(
        [FORM.format("a")] * 3, [256, 256, None], ["1"] * 3, "choice", tokens=[64] * 3, **columns
    )
    assert values == [1.5, None, None]
    with pytest.raises(RewardError, match="'id'"):
        get_reward({"name": "visionthink_cost", "params": {"score": "choice"}})([RIGHT], max_budget=[4])


def test_dual_cost_follows_the_log():
    given = {"max_budget": [256] * 2, "tokens": [64, 64], "target": 0.25, "step": 0.5}
    logged = {}
    state = SimpleNamespace(log_history=[])
    assert dual_cost([RIGHT, SILENT], price=0.4, trainer_state=state, log_metric=logged.__setitem__, **given) == [
        -0.1,
        -0.4,
    ]
    assert logged == {"dual_cost/cost": 0.625, "dual_cost/price": 0.4}
    state.log_history += [
        {"loss": 0.1, "dual_cost/cost": 0.45},
        {"eval_dual_cost/cost": 1.0},
        {"dual_cost/cost": None},
    ]
    assert dual_cost([RIGHT, SILENT], price=0.4, trainer_state=state, **given) == pytest.approx([-0.125, -0.5])
    state.log_history.append({"dual_cost/cost": 0.0})
    assert dual_cost([RIGHT, SILENT], price=0.0, trainer_state=state, **given) == [0.0, 0.0]


def test_dual_cost_pays_the_score_too():
    columns = {"answer": ["a"], "options": [["a", "b"]]}
    reward = get_reward({"name": "dual_cost", "params": {"target": 0.1, "price": 0.4, "score": "choice"}})
    logged = {}
    assert reward([RIGHT], max_budget=[256], tokens=[64], log_metric=logged.__setitem__, **columns) == [0.9]
    assert logged["dual_cost/cost"] == 0.25
    assert reward([RIGHT], max_budget=[None], tokens=[64], **columns) == [None]


def budget(text):
    return f"<think></think><answer>{text}</answer>"


def test_birr_cost_takes_the_score_from_the_sweep():
    answers = ["16", "63", "64", "255 tokens", "256", "4000", "8", "many", "1"]
    n = len(answers)
    columns = {"native": [2142] * n, "budgets": [[16, 256, 64]] * n, "scores": [[0.2, 1.0, 0.6]] * n}
    values = birr_cost([budget(a) for a in answers], **columns)
    assert values == pytest.approx([0.2, 0.2, 0.6, 0.6, 0.5, 0.5, 0.0, 0.0, 0.0])
    assert birr_cost([budget("99"), budget("100")], native=[100] * 2, budgets=[[16]] * 2, scores=[[1]] * 2) == [
        1.0,
        0.5,
    ]


@pytest.mark.parametrize(
    "row",
    [{"native": None}, {"budgets": None}, {"budgets": [16]}, {"budgets": [16, "64"]}, {"scores": [0.1, NAN]},
     {"scores": [0.1, 2.0]}, {"budgets": [], "scores": []}, {"scores": "ab"}],
)  # fmt: skip
def test_birr_cost_without_a_usable_sweep_does_not_apply(row, caplog):
    warn_unscorable.cache_clear()
    row = {"native": 100, "budgets": [16, 64], "scores": [0.1, 0.9]} | row
    assert birr_cost([budget("20")], id=["row-7"], **{key: [value] for key, value in row.items()}) == [None]
    assert "row-7" in caplog.text


SPECS = {
    "linear_cost": {}, "linear_cost with a score": {"score": "choice"}, "visionthink_cost": {"score": "choice"},
    "dual_cost": {"score": "choice", "price": 0.7, "target": 0.1}, "birr_cost": {},
}  # fmt: skip
SILENCES = ["", "a", "<answer></answer>", "<answer>a</answer><answer>a</answer>"]
outputs = st.sampled_from(["16", "64", "256", "a", "b", "answer"])


@pytest.mark.parametrize("name", SPECS)
@given(
    readable=st.lists(st.tuples(outputs, st.sampled_from([4, 64, 200, 256]), st.booleans()), min_size=1, max_size=6),
    unreadable=st.lists(
        st.sampled_from(["", "a", "<answer></answer>", "<answer>a</answer><answer>a</answer>"]), min_size=1
    ),
)
def test_an_unreadable_completion_never_beats_a_readable_one(name, readable, unreadable):
    """Of the same case; for a policy that is asked for a budget, text without a number is unreadable as well."""
    completions = [FORM.format(a) if form else f"<answer>{a}</answer>" for a, _, form in readable] + unreadable
    asked = name == "birr_cost"
    silent = [i >= len(readable) or (asked and not readable[i][0].isdigit()) for i in range(len(completions))]
    n = len(completions)
    columns = {
        "answer": ["a"] * n, "options": [["a", "b"]] * n, "id": ["1"] * n, "max_budget": [256] * n,
        "tokens": [t for _, t, _ in readable] + [4] * len(unreadable), "native": [2142] * n,
        "budgets": [[16, 64, 256]] * n, "scores": [[0.0, 0.5, 1.0]] * n,
    }  # fmt: skip
    values = get_reward({"name": name.split()[0], "params": SPECS[name]})(completions, **columns)
    best = max(value for value, quiet in zip(values, silent, strict=True) if quiet)
    assert all(best <= value + 1e-12 for value, quiet in zip(values, silent, strict=True) if not quiet)


@pytest.mark.parametrize(
    ("name", "params"),
    [("visionthink_cost", {"score": "choice", "penalty": -1}), ("dual_cost", {"target": 0.1, "price": -1}),
     ("dual_cost", {"target": NAN}), ("dual_cost", {"target": 0.1, "step": -1})],
)  # fmt: skip
def test_negative_parameters_are_refused(name, params):
    with pytest.raises(InputError, match="give 0 or more"):
        get_reward({"name": name, "params": params})([RIGHT], max_budget=[4], tokens=[4], id=["1"])
