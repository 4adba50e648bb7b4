from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from frugalpath.models.feature_bank import COLUMNS, FeatureBank, VisualTokens, cells, extent
from frugalpath.slides.store import Features, read_features
from tests.conftest import SIDE, WIDTH, grid_features


class CountingBank(FeatureBank):
    """A bank that counts how often a file is read."""

    reads = 0

    def load(self, source: str) -> Features:
        self.reads += 1
        return super().load(source)


def test_every_source_and_budget_is_pooled_once(bank):
    counting = CountingBank(bank.files)
    first = counting.see("field0", 4)
    assert counting.see("field0", 4) is first
    assert counting.reads == 1
    one, four, sixteen = counting.see_all("field0", [1, 4, 16])
    assert four is first and counting.reads == 2
    assert counting.see("field0", 16) is sixteen and counting.see("field0", 1) is one
    assert counting.see("field1", 4) is not first
    assert counting.reads == 3


def test_the_width_is_read_without_the_features(bank):
    counting = CountingBank(bank.files)
    assert counting.dim == WIDTH and counting.reads == 0
    counting.add(CountingBank(bank.files))
    assert counting.reads == 0


def test_tokens_are_features_then_place(bank):
    tokens = bank.see("field3", 100)
    stored = read_features(bank.files["field3"])
    assert tokens.rows.shape == (36, WIDTH + COLUMNS) and tokens.rows.dtype == torch.float32
    assert (len(tokens), tokens.budget, tokens.source) == (36, 100, "field3")
    np.testing.assert_array_equal(tokens.rows[:, :WIDTH].numpy(), stored.features)
    np.testing.assert_allclose(tokens.rows[0, WIDTH:], [1 / 12, 1 / 12, 1 / 6, 1], rtol=1e-6)
    np.testing.assert_allclose(tokens.rows[-1, WIDTH:], [11 / 12, 11 / 12, 1 / 6, 1], rtol=1e-6)
    assert bank.see("field3", 4).rows[:, -1].tolist() == [9.0] * 4, "patches in each"
    assert bank.dim == WIDTH


def test_memory_stays_under_the_cap_and_the_oldest_go_first(make_bank):
    tight = make_bank({"field": grid_features(30, 40)}, cache_mb=1)
    budgets = range(2000, 2060)
    seen = [tight.see("field", b) for b in budgets]
    room = 2**20 // seen[0].rows.nbytes
    assert room == 18
    kept = [tight.see("field", b) is tokens for b, tokens in reversed(list(zip(budgets, seen, strict=True)))]
    assert kept[:room] == [True] * room, "the newest are still there"
    assert not any(kept[room:])
    assert torch.equal(tight.see("field", budgets[0]).rows, seen[0].rows)


@pytest.mark.slow
def test_a_small_cap_still_holds_one_ladder(make_bank):
    tight = make_bank({"field": grid_features(160, 160)}, cache_mb=1)
    budgets = list(range(20000, 20016))
    seen = tight.see_all("field", budgets)
    assert seen[0].rows.nbytes > 2**19
    assert all(tight.see("field", b) is tokens for b, tokens in zip(budgets, seen, strict=True))


def test_cells_of_a_file_without_size_span_its_patches():
    stored = grid_features(2, 4)
    bare = Features(stored.features, stored.coords, {"patch_size": SIDE})
    np.testing.assert_array_equal(cells(bare), cells(stored))
    assert (cells(stored) / extent(stored))[:, :2].max() < 1 and np.allclose(
        (cells(stored) / extent(stored))[:, 2], 0.25
    )


def test_a_deep_copy_shares_the_tokens():
    tokens = VisualTokens(torch.zeros(2, 11), 4, "x")
    assert copy.deepcopy([{"image": tokens}])[0]["image"] is tokens
