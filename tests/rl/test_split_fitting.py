"""The split allocator is fitted on answers to planted cases, and the answers are kept."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from models.allocators.split import SplitAllocator, SplitConfig
from rewards.registry import get_rewards
from rl.allocation.choice import Room
from rl.allocation.fitting import fit_by_patient, fit_table, predict
from rl.allocation.splits import SplitTable, draw_splits
from rl.scoring import Scorer
from tests.conftest import WIDTH
from tests.rl.test_table import table  # noqa: F401

LEVELS = (0, 1, 4, 16)
ROOM = Room((LEVELS,) * 3, 48, tuple((b,) * 3 for b in (1, 4, 16)))
SPLITS = ROOM.all()


def planted(look: torch.Tensor, score) -> tuple[SplitAllocator, list[torch.Tensor], dict]:
    """A new allocator, its inputs and the scores of 12 random splits of each case; `score(case, split)` is true."""
    torch.manual_seed(0)
    config = SplitConfig(
        slide_ladder=LEVELS, look=(1,), feature_dim=WIDTH, width=32, buckets=8, dropout=0.1, look_dropout=0.1
    )
    rng = np.random.default_rng(0)
    drawn = [ROOM.draw(12, rng)[:12] for _ in look]
    scores = torch.tensor([[score(i, s) for s in own] for i, own in enumerate(drawn)])
    scores[::5, -2:] = torch.nan  # some were not answered
    question = torch.ones(len(look), 3, dtype=torch.long)
    options = {"batch_size": 16, "learning_rate": 1e-2, "further": (torch.tensor(drawn),)}
    return SplitAllocator(config), [look, question, scores], options


def best(allocator: SplitAllocator, look: torch.Tensor, price: float) -> list[tuple[int, ...]]:
    """What is chosen for cases at a price per token of the largest budget."""
    question = torch.ones(len(look), 3, dtype=torch.long)
    values = predict(allocator, look, question, torch.tensor([SPLITS] * len(look)))
    cost = np.array([sum(s) for s in SPLITS]) / 48
    return [SPLITS[k] for k in (values - price * cost).argmax(1)]


def test_the_slide_whose_look_says_that_it_matters_gets_the_tokens():
    look = torch.randn(160, 3, 1, WIDTH) * 0.3
    at = torch.randint(3, (160,))
    look[torch.arange(160), at, :, 0] += 4.0
    start, inputs, options = planted(look[:120], lambda i, s: {0: 0.0, 1: 0.3, 4: 0.6, 16: 1.0}[s[at[i]]])
    patients = [f"p{i // 2}" for i in range(120)]
    allocator, values, losses = fit_by_patient(start, *inputs, patients, 20, **options)
    assert values.shape == (120, 12) and np.isfinite(losses).all()
    found = best(allocator, look[120:], 0.3)
    own = [s[k] for s, k in zip(found, at[120:], strict=True)]
    assert np.mean([o == max(s) and o >= 4 for o, s in zip(own, found, strict=True)]) > 0.9
    assert np.mean([sum(s) - o for o, s in zip(own, found, strict=True)]) < 2, "others get next to nothing"


def test_slides_that_are_alike_get_the_same():
    """The slide that is seen worst decides, whichever it is."""
    look = torch.randn(100, 1, 1, WIDTH).expand(-1, 3, -1, -1) * 0.3 + 1
    allocator, inputs, options = planted(look[:80], lambda i, s: {0: 0.0, 1: 0.3, 4: 0.7, 16: 0.9}[min(s)])
    fit_table(allocator, *inputs, epochs=60, **options)
    found = best(allocator, look[80:], 0.3)
    assert np.mean([s in ROOM.equal for s in found]) > 0.9
    assert np.mean([s == (4, 4, 4) for s in found]) > 0.9


@pytest.fixture
def pairs(cases):
    """Four cases of two slides."""
    return [dataclasses.replace(c, images=(f"field{i}", f"field{i + 4}")) for i, c in enumerate(cases[:4])]


def test_answers_are_asked_for_once_and_a_stopped_run_goes_on(performer, pairs, tmp_path, monkeypatch):
    scorer, path = Scorer(get_rewards(["choice"]), 16), tmp_path / "tables" / "splits.jsonl"
    rooms = [Room.of(performer, c, (0, 1, 4), (2, 8)) for c in pairs]
    assert rooms[0] == Room(((0, 1, 4), (0, 1, 4)), 8, ((1, 1), (4, 4)))
    splits = draw_splits(pairs, rooms, 3, seed=0)
    assert splits == draw_splits(pairs, rooms, 3, seed=0) and splits[0] != splits[1]
    asked: list[tuple[str, tuple[int, ...]]] = []
    answer = type(performer).answer

    def count(self, cases, budgets, *rest):
        asked.extend((c.id, tuple(s)) for c, s in zip(cases, rest[-1], strict=True))
        return answer(self, cases, budgets, *rest)

    monkeypatch.setattr(type(performer), "answer", count)
    monkeypatch.setattr("rl.allocation.splits.CHUNK", 4)
    saved, save = [0], SplitTable.save

    def stop(self):
        save(self)
        saved[0] += 1
        if saved[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SplitTable, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            SplitTable(path).ask(performer, pairs, splits, scorer, 4, 64, "splits")
    assert len(asked) == 8 == len(path.read_text().splitlines())
    found = SplitTable(path).ask(performer, pairs, splits, scorer, 4, 64, "splits")
    assert sorted(asked) == sorted((c.id, s) for c, own in zip(pairs, splits, strict=True) for s in own)
    assert SplitTable(path).ask(performer, pairs, splits, scorer, 4, 64, "splits") == found
    assert len(asked) == sum(map(len, splits)), "the third time nothing is asked"
    assert [p.name for p in path.parent.iterdir()] == ["splits.jsonl"]
    (alone,) = answer(performer, pairs[:1], [sum(splits[0][2])], 4, 64, [splits[0][2]])
    row = found[0][2]
    assert (row.text, row.visual, row.flops) == (alone.text, alone.visual, pytest.approx(alone.flops))


def test_answers_at_equal_shares_are_taken_from_a_score_table(table, tmp_path):  # noqa: F811
    rooms = [Room(((0, 1, 8),) * 2, 16, ((1, 0), (8, 8)))] * 3
    kept = SplitTable(tmp_path / "splits.jsonl")
    before = copy.copy(kept.rows)
    kept.take(table, rooms, [1, 16])
    assert not before and len(kept.rows) == 6
    row = kept.rows["c2", (8, 8)]
    assert (row.score, row.visual, row.text) == (table.score[2, 2], 16, table.text[2][2])
    kept.save()
    assert SplitTable(kept.path).rows == kept.rows
    assert json.loads(kept.path.read_text().splitlines()[0])["budgets"] == [1, 0]
