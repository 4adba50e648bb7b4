from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.envs.case import Case
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.pool import Pool, grid_shape, pool
from tests.conftest import grid_features


def field(rows: int, columns: int, keep: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 5) and cells (N, 3) of a square grid of patches, a share of them on tissue."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:rows, :columns]
    size = max(rows, columns)
    cells = np.stack([(across.ravel() + 0.5) / columns, (down.ravel() + 0.5) / rows, np.full(down.size, 1 / size)], 1)
    here = rng.random(down.size) <= keep
    here[rng.integers(down.size)] = True
    return rng.normal(size=(here.sum(), 5)).astype(np.float32), cells[here].astype(np.float32)


fields = st.builds(
    field,
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    keep=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 99),
)


@given(fields, st.integers(1, 60))
def test_at_most_budget_tokens_with_places_inside_the_field(patches, budget):
    tokens, places = pool(*patches, budget)
    assert 1 <= len(tokens) == len(places) <= budget
    assert tokens.dtype == places.dtype == np.float32
    assert (places >= 0).all() and (places <= 1).all()
    assert len(np.unique(places[:, :2], axis=0)) == len(places)


@given(fields, st.integers(1, 60))
def test_every_patch_counts_once(patches, budget):
    features, cells = patches
    # A one-hot column a patch: a token's non-zero columns are its patches, its largest value is 1 / their number.
    owners, _ = pool(np.eye(len(features), dtype=np.float32), cells, budget)
    count = 1 / owners.max(1)
    np.testing.assert_allclose(count[:, None] * owners, owners > 0, atol=1e-5)
    np.testing.assert_array_equal((owners > 0).sum(0), 1)
    tokens, _ = pool(features, cells, budget)
    np.testing.assert_allclose((tokens * count[:, None]).sum(0) / count.sum(), features.mean(0), atol=1e-5)


@given(fields, st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_of_patches_does_not_matter(patches, budget, random):
    features, cells = patches
    order = list(range(len(features)))
    random.shuffle(order)
    tokens, places = pool(features, cells, budget)
    again, places_again = pool(features[order], cells[order], budget)
    if len(features) <= budget:
        tokens, places = tokens[order], places[order]
    np.testing.assert_allclose(again, tokens, atol=1e-5)
    np.testing.assert_array_equal(places_again, places)


@given(fields)
def test_a_field_that_fits_is_returned_as_it_is(patches):
    features, cells = patches
    for budget in (len(features), len(features) + 5):
        tokens, places = pool(features, cells, budget)
        np.testing.assert_array_equal(tokens, features)
        np.testing.assert_array_equal(places, cells)


def test_constant_features_stay_constant():
    features, cells = field(9, 7)
    tokens, _ = pool(np.full_like(features, 0.25), cells, 12)
    np.testing.assert_array_equal(tokens, 0.25)


def test_a_token_is_the_mean_of_its_quarter():
    features, cells = field(4, 4)
    tokens, places = pool(features, cells, 4)
    quarters = features.reshape(2, 2, 2, 2, 5).mean((1, 3)).reshape(4, 5)
    np.testing.assert_allclose(tokens, quarters, atol=1e-6)
    np.testing.assert_allclose(places, [[x, y, 0.5] for y in (0.25, 0.75) for x in (0.25, 0.75)], atol=1e-6)


def test_one_token_is_the_mean_of_all():
    features, cells = field(5, 6, keep=0.6)
    tokens, _ = pool(features, cells, 1)
    np.testing.assert_allclose(tokens[0], features.mean(0), atol=1e-6)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_below_one_is_refused(budget):
    with pytest.raises(ValueError, match="at least 1"):
        pool(*field(2, 2), budget)


@given(st.integers(1, 300), st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0]))
def test_the_grid_uses_the_budget_up(budget, aspect):
    rows, columns = grid_shape(budget, aspect)
    assert rows * columns <= budget
    assert rows * columns >= budget / 2


@pytest.mark.parametrize(
    ("budget", "aspect", "shape"), [(13, 1.0, (3, 4)), (16, 4.0, (2, 8)), (16, 0.25, (8, 2)), (5, 1.0, (2, 2))]
)
def test_the_cells_are_nearly_square(budget, aspect, shape):
    assert sorted([grid_shape(budget, aspect), shape])[0] in (shape, shape[::-1])
    assert grid_shape(budget, aspect) == shape or aspect == 1.0


@pytest.mark.parametrize("side", [1, 2, 4, 7, 14])
def test_a_square_budget_gives_a_square_field_a_square_grid(side):
    assert grid_shape(side * side, 1.0) == (side, side)


def as_tokens(patches: tuple[np.ndarray, np.ndarray]) -> Tokens:
    rows = np.concatenate([*patches, np.ones((len(patches[0]), 1))], 1, dtype=np.float32)
    return Tokens.from_rows([torch.from_numpy(rows)])


def nested(patches: tuple[np.ndarray, np.ndarray], budget: int) -> torch.Tensor:
    return Pool(patches[0].shape[1], nested=True)(as_tokens(patches), budget).rows()[0]


@given(fields, st.integers(1, 120), st.integers(1, 120))
def test_nested_tokens_begin_with_those_of_a_smaller_budget(patches, one, other):
    small, large = (nested(patches, b) for b in sorted((one, other)))
    assert 1 <= len(small) <= min(one, other) and len(large) <= max(one, other)
    assert torch.equal(large[: len(small)], small)


@given(fields, st.integers(1, 400))
def test_nested_grids_are_those_of_single_budgets_and_each_counts_every_patch(patches, budget):
    tokens, at = nested(patches, budget), 0
    for level in itertools.count():
        plain = Pool(5)(as_tokens(patches), 4**level).rows()[0]
        if at + len(plain) > budget:
            break
        assert torch.equal(tokens[at : at + len(plain)], plain)
        assert plain[:, -1].sum() == len(patches[0])
        at += len(plain)
        if len(patches[0]) <= 4**level:
            break
    assert at == len(tokens)


@given(fields)
def test_no_more_nested_tokens_than_there_is_room_for(patches):
    n = len(patches[0])
    room = Pool(5, nested=True).room(n)
    assert len(nested(patches, 10_000)) <= room
    if n == 144:  # no cell is empty
        assert len(nested(patches, 10_000)) == room == 1 + 4 + 16 + 64 + 144


@pytest.mark.parametrize(
    ("budget", "tokens"), [(1, 1), (4, 1), (5, 5), (20, 5), (21, 21), (84, 21), (85, 85), (200, 85)]
)
def test_the_nested_ladder_of_a_full_field(budget, tokens):
    assert len(nested(field(12, 12), budget)) == tokens


def test_slides_that_share_a_nested_budget_take_what_others_have_no_room_for(make_performer, make_bank):
    bank = make_bank({"small": grid_features(1, 2), "large": grid_features(8, 8)})
    case = Case("c", "p", "choice", "Which?", "normal", images=("small", "large"), options=("normal", "tumour"))
    performer = make_performer(compressors=[{"name": "pool", "nested": True}])
    performer.bank = bank
    assert [len(v) for v in performer.see(case, 24)] == [3, 21], "1 + 2 of the small one, whose room is 3"
