from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from examples.token_budget import ID, TokenBudget, observations
from frugalpath.allocator.score_table import ScoreTable
from frugalpath.errors import InputError

BUDGETS = [1, 4, 16]
COUNT = 60


def arrays() -> dict:
    """Cases whose only feature is 0 or 1: those of 0 are solved by any budget, those of 1 by 4 tokens and more."""
    light = np.arange(COUNT) % 3 == 0
    score = np.stack([~light, np.ones(COUNT), np.ones(COUNT)], 1).astype(float)
    flops = np.broadcast_to(np.array([10.0, 20.0, 100.0]), score.shape)
    return {"score": score, "flops": flops, "budgets": BUDGETS, "observation": light[:, None].astype(float)}


def table() -> ScoreTable:
    data = arrays()
    count = np.zeros((COUNT, 3), dtype=int)
    return ScoreTable(
        [f"case{i}" for i in range(COUNT)],
        [f"p{i}" for i in range(COUNT)],
        ["q"] * COUNT,
        BUDGETS,
        data["score"],
        np.tile([0.2, 0.5, 0.9], (COUNT, 1)),
        count + BUDGETS,
        count,
        count,
        np.array(data["flops"]),
        [["a"] * 3] * COUNT,
    )


@pytest.mark.parametrize("escalating", [False, True])
@pytest.mark.parametrize("price", [0.1, (0.01, 1.0)])
def test_gymnasium_finds_nothing_wrong(escalating, price):
    confidence = np.full((COUNT, 3), 0.5) if escalating else None
    # The checker thinks that a constant entry of an observation is a mistake, and that a price should have a limit.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(TokenBudget(**arrays(), price=price, escalating=escalating, confidence=confidence))
        made = gymnasium.make(ID, **arrays(), price=price, escalating=escalating, confidence=confidence)
        check_env(made.unwrapped)


def test_a_step_looks_the_reward_up():
    env = TokenBudget.from_table(table(), arrays()["observation"], price=0.5)
    for case, action, reward, score, cost, oracle in [
        (0, 0, -0.05, 0.0, 0.1, 1),
        (0, 1, 0.9, 1.0, 0.2, 1),
        (1, 0, 0.95, 1.0, 0.1, 0),
        (1, 2, 0.5, 1.0, 1.0, 0),
    ]:
        seen, before = env.reset(options={"case": case})
        assert seen.tolist() == [float(case % 3 == 0), 0.5] and before["case"] == f"case{case}"
        _, found, over, cut, info = env.step(action)
        assert over and not cut and found == pytest.approx(reward)
        assert info == {"case": f"case{case}", "score": score, "cost": pytest.approx(cost), "oracle": oracle}
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(0)


def test_every_look_is_paid_for():
    env = TokenBudget.from_table(table(), arrays()["observation"], price=0.5, escalating=True)
    seen, info = env.reset(options={"case": 0})
    assert seen.tolist() == pytest.approx([1, 0, 0.2, 0.5]) and info["cost"] == pytest.approx(0.1)
    assert env.step(0)[1:3] == (pytest.approx(-0.05), True)
    env.reset(options={"case": 0})
    seen, reward, over, _, info = env.step(1)
    assert seen.tolist() == pytest.approx([1, 0.5, 0.5, 0.5]) and (reward, over) == (0, False)
    assert (info["cost"], info["oracle"]) == (pytest.approx(0.3), 1)
    seen, reward, over, _, info = env.step(1)
    assert (reward, over, info["cost"]) == (0, False, pytest.approx(1.3))
    # There is no larger budget, so that it answers.
    _, reward, over, _, info = env.step(1)
    assert over and reward == pytest.approx(1 - 0.5 * 1.3)


def test_prices_are_drawn_from_the_range_or_set():
    env = TokenBudget(**arrays(), price=(0.01, 1.0))
    drawn = np.array([env.reset(seed=i)[0][-1] for i in range(400)])
    assert drawn.min() >= 0.01 and drawn.max() <= 1 and np.mean(drawn < 0.1) == pytest.approx(0.5, abs=0.1)
    assert env.reset(options={"price": 3.0})[0][-1] == 3.0
    first, again = (env.reset(seed=5) for _ in range(2))
    assert first[0].tolist() == again[0].tolist() and first[1] == again[1]


def test_objectives_are_those_of_rewards():
    env = TokenBudget(**arrays(), objective="birr")
    rewards = []
    for action in range(3):
        env.reset(options={"case": 1})
        rewards.append(env.step(action)[1])
    assert rewards == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_several_environments_run_side_by_side(mode):
    envs = gymnasium.make_vec(ID, num_envs=2, vectorization_mode=mode, **arrays(), price=0.1)
    try:
        seen, _ = envs.reset(seed=0)
        assert seen.shape == (2, 2)
        _, reward, over, _, info = envs.step(np.array([2, 2]))
        assert reward.tolist() == pytest.approx([0.9, 0.9]) and over.all() and info["cost"].tolist() == [1.0, 1.0]
    finally:
        envs.close()


def test_a_learner_that_looks_beats_every_constant_and_one_that_does_not_reaches_the_best():
    """Action values by sample means, of what is seen or of nothing; drawn at random for a while, then greedy."""
    env = TokenBudget(**arrays(), price=0.5)
    means = {}
    for name, sees in (("blind", False), ("seeing", True)):
        rng, total, count = np.random.default_rng(0), np.zeros((2, 3)), np.zeros((2, 3))
        for episode in range(1200):
            state = int(env.reset(seed=0 if episode == 0 else None)[0][0]) * sees
            greedy = (total[state] / count[state].clip(1)).argmax()
            action = int(rng.integers(3)) if episode < 600 else int(greedy)
            reward = env.step(action)[1]
            total[state, action] += reward
            count[state, action] += 1
        rewards = []
        for case in range(COUNT):
            state = int(env.reset(options={"case": case})[0][0]) * sees
            rewards.append(env.step(int((total[state] / count[state].clip(1)).argmax()))[1])
        means[name] = np.mean(rewards)
    data = arrays()
    worth = data["score"] - 0.5 * data["flops"] / 100
    assert means["blind"] == pytest.approx(worth.mean(0).max())
    assert means["seeing"] == pytest.approx(worth.max(1).mean()) and means["seeing"] > means["blind"] + 0.02
    assert means["blind"] > worth.mean() + 0.1, "better than at random"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"flops": np.ones((COUNT, 2))}, r"flops: shape \(60, 2\) is not that of score, \(60, 3\)"),
        ({"observation": np.zeros(COUNT)}, r"observation: shape \(60,\) is not \(60, D\)"),
        ({"observation": np.full((COUNT, 1), np.nan)}, "observation: has values that are not finite"),
        ({"budgets": [4, 1, 16]}, r"budgets: \[4, 1, 16\] are not 3 ascending"),
        ({"price": (0.0, 1.0)}, "price: 0.0..1.0 is no price"),
        ({"objective": "cheap"}, "objective: 'cheap' is unknown"),
    ],
)
def test_what_does_not_fit_is_named(changes, problem):
    with pytest.raises(InputError, match=problem):
        TokenBudget(**{**arrays(), **changes})


def test_options_and_actions_that_do_not_fit_are_named():
    env = TokenBudget(**arrays())
    for options, problem in (
        ({"case": 60}, "case 60 is not in 0..59"),
        ({"price": -1}, "price -1.0"),
        ({"id": 1}, "unknown option 'id'"),
    ):
        with pytest.raises(InputError, match=problem):
            env.reset(options=options)
    env.reset()
    with pytest.raises(InputError, match="action 3 is not in"):
        env.step(3)


def test_observations_are_the_pooled_look_and_the_words_of_the_question():
    look = torch.zeros(2, 2, 3, 4)
    look[0, 0] = torch.arange(12.0).view(3, 4)
    look[1] = torch.ones(2, 3, 4)
    look[1, 1] = 3.0
    found = observations(look, torch.tensor([[5, 5, 9, 0], [70, 0, 0, 0]]), buckets=64)
    assert found.shape == (2, 68) and found.dtype == np.float32
    assert found[0, :4].tolist() == [4, 5, 6, 7] and found[1, :4].tolist() == [2, 2, 2, 2]
    assert found[0, 4 + 5] == pytest.approx(2 / 3) and found[0, 4 + 9] == pytest.approx(1 / 3)
    assert found[1, 4 + 6] == 1 and found[:, 4:].sum() == pytest.approx(2)


def run(*arguments: str) -> subprocess.CompletedProcess:
    script = Path(__file__).parents[2] / "examples" / "token_budget.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_script_learns_a_budget_for_each_kind_of_question(tmp_path):
    """The kind tells which cases the smallest budget solves."""
    kinds = ["heavy" if i % 3 == 0 else "light" for i in range(COUNT)]
    dataclasses.replace(table(), questions=kinds).save(tmp_path / "table.jsonl")
    done = run(str(tmp_path / "table.jsonl"), "--price", "0.5", "--episodes", "2000")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["budgets"] == {"heavy": 4, "light": 1} and 25 <= found["n"] <= 35
    assert found["learned"] == pytest.approx(found["oracle"])
    assert found["oracle"] > found["static"] + 0.02 > found["random"] + 0.1


@pytest.mark.slow
def test_the_script_names_a_table_that_is_not_there(tmp_path):
    done = run(str(tmp_path / "none.jsonl"))
    assert done.returncode == 2 and "none.jsonl: no such score table" in done.stderr


@pytest.mark.slow
def test_without_gymnasium_the_remedy_is_named():
    code = "import sys; sys.modules['gymnasium'] = None; import examples.token_budget"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "this example needs gymnasium; pip install gymnasium" in done.stderr
