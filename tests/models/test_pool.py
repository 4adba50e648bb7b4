from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.compressors.pool import grid_shape, pool


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
quick = settings(max_examples=40, deadline=None)


@quick
@given(fields, st.integers(1, 60))
def test_at_most_budget_tokens_with_places_inside_the_field(patches, budget):
    tokens, places = pool(*patches, budget)
    assert 1 <= len(tokens) == len(places) <= budget
    assert tokens.dtype == places.dtype == np.float32
    assert (places >= 0).all() and (places <= 1).all()
    assert len(np.unique(places[:, :2], axis=0)) == len(places)


@quick
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


@quick
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


@quick
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


@quick
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
