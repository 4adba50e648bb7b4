"""The curve of looks on the miniature world: every look, its regret by hand, and the picture."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.looks import Looks, draw, measure, parse, regret
from envs.score_table import ScoreTable
from rl.deciders.base import Decisions
from tests.rl.planted import planted

PRICES = (0.05, 0.4)


def test_regret_by_hand():
    flops = np.array([[1.0, 4.0], [1.0, 4.0]])
    score = np.array([[0.2, 1.0], [0.5, 0.5]])
    none = np.zeros((2, 2))
    table = ScoreTable(
        ["a", "b"], ["p", "q"], ["x", "x"], [1, 4], score, none, none, none, none, flops, [["", ""], ["", ""]]
    )
    decided = Decisions.from_table(0.2, table, np.array([0, 1]), np.array([0.0, 0.4]))
    # Best: 1 - 0.2 x 1 and 0.5 - 0.2 x 0.25; chosen: 0.2 - 0.2 x 0.25 and 0.5 - 0.2 x 1.1.
    np.testing.assert_allclose(regret(table, decided, 4.0), [0.8 - 0.15, 0.45 - 0.28])


@pytest.fixture(scope="module")
def rows(make_performer, cases, tmp_path_factory) -> tuple[Looks, list[dict]]:
    looks = Looks(*planted(make_performer, cases, tmp_path_factory.mktemp("run")))
    return looks, measure(looks, PRICES, 50)


def test_every_look_has_its_row(rows):
    looks, found = rows
    names = ["none", "question", "1", "1+5", "1+5+21", "state 1", "confidence 1", "state + confidence 5", "sure"]
    assert [(r["look"], r["price"]) for r in found] == [(n, p) for n in [*names, "escalate"] for p in PRICES]
    for row in found:
        low, high = row["ci95"]
        assert 0 <= low <= row["regret"] <= high
        assert row["cost_share"] >= row["look_share"] >= 0
        assert row["less"]["value"] == pytest.approx(
            next(r["regret"] for r in found if r["look"] == looks.own and r["price"] == row["price"]) - row["regret"]
        )
    assert all(r["look_share"] == 0 for r in found if r["look"] == "none")
    shares = {r["look"]: r["look_share"] for r in found if r["price"] == PRICES[0]}
    assert shares["question"] < shares["1"] < shares["1+5"] < shares["state 1"]


def test_looks_are_drawn(rows, tmp_path):
    draw(rows[1], tmp_path / "deep" / "looks.png")
    assert (tmp_path / "deep" / "looks.png").stat().st_size > 1000


def test_options_beside_the_recipe():
    options, rest = parse(["--config", "x.yaml", "--prices", "0.1", "--set", "allocator.look=[1]"])
    assert options.prices == [0.1] and rest == ["--config", "x.yaml", "--set", "allocator.look=[1]"]
