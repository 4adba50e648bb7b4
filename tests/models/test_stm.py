from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.compressors.chain import make_compressor
from frugalpath.models.compressors.stm import SparseTokenMerger

WIDTH = 6
SIDE = 64.0


def slide(features: np.ndarray, at: np.ndarray, size: np.ndarray | None = None) -> Tokens:
    """Patches (n, d) at columns and rows (n, 2) of a grid, in pixels."""
    n = len(features)
    size = np.ones(n) if size is None else size
    parts = [features, at * SIDE + SIDE / 2, np.full((n, 1), SIDE), size[:, None]]
    return Tokens.from_rows([torch.from_numpy(np.concatenate(parts, 1, dtype=np.float32))])


def grid(rows: int, columns: int) -> np.ndarray:
    down, across = np.mgrid[:rows, :columns]
    return np.stack([across.ravel(), down.ravel()], 1).astype(np.float64)


def made(rows: int, columns: int, spread: float, keep: float, seed: int) -> Tokens:
    """Some of a grid's patches, around two directions, of size 1 to 3."""
    rng = np.random.default_rng(seed)
    at = grid(rows, columns)
    at = at[(rng.random(len(at)) <= keep) | (np.arange(len(at)) == rng.integers(len(at)))]
    kinds = rng.normal(size=(2, WIDTH))
    features = kinds[rng.integers(2, size=len(at))] + spread * rng.normal(size=(len(at), WIDTH))
    return slide(features, at, rng.integers(1, 4, len(at)).astype(float))


slides = st.builds(
    made,
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    spread=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    keep=st.sampled_from([0.2, 0.6, 1.0]),
    seed=st.integers(0, 999),
)
mergers = st.builds(
    SparseTokenMerger, st.just(WIDTH), window=st.integers(2, 4), threshold=st.sampled_from([0.5, 0.9, 1.0])
)


@given(slides, mergers, st.integers(1, 60))
def test_sizes_and_means_are_kept_within_the_budget(tokens, merger, budget):
    out = merger(tokens, budget)
    n = out.size.shape[1]
    assert 1 <= n <= min(budget, tokens.size.shape[1])
    assert (out.size > 0).all() and out.size.sum() == tokens.size.sum()
    for part in ("features", "place"):
        before, after = ((getattr(t, part)[..., :2] * t.size[..., None]).sum(1) for t in (tokens, out))
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-2)
    area = [float((t.place[..., 2] ** 2).sum()) for t in (tokens, out)]
    assert area[1] == pytest.approx(area[0], rel=1e-4)
    whole = (out.features * out.size[..., None]).sum(1) / out.size.sum()
    np.testing.assert_allclose(whole, (tokens.features * tokens.size[..., None]).sum(1) / tokens.size.sum(), atol=1e-4)


@given(slides, mergers, st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_order_of_patches_does_not_matter_in_any_bit(tokens, merger, budget, random):
    order = list(range(tokens.size.shape[1]))
    random.shuffle(order)
    mixed = Tokens(tokens.features[:, order], tokens.place[:, order], tokens.size[:, order])
    first, second, again = (merger(t, budget).rows()[0] for t in (tokens, mixed, tokens))
    assert torch.equal(first, second) and torch.equal(first, again)


@given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 999), st.integers(2, 30), st.floats(-1, 0.6))
def test_a_single_outlier_stays_alone_at_every_budget_above_one(rows, columns, seed, budget, likeness):
    rng = np.random.default_rng(seed)
    width = 64
    common, other = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
    at = grid(rows, columns)
    features = common + 0.3 / np.sqrt(width) * rng.normal(size=(len(at), width))
    planted = likeness * common + np.sqrt(1 - likeness**2) * other
    where = rng.integers(len(at))
    features[where] = planted
    out = SparseTokenMerger(width)(slide(features, at), budget)
    alone = (out.features[0] - torch.from_numpy(planted).float()).norm(dim=1).argmin()
    assert out.size[0, alone] == 1
    assert torch.equal(out.features[0, alone], torch.from_numpy(planted).float())
    assert out.place[0, alone, :2].tolist() == (at[where] * SIDE + SIDE / 2).tolist()


def test_alike_patches_of_a_window_merge_and_others_do_not():
    near, far = np.eye(WIDTH)[0], np.eye(WIDTH)[1]
    at = grid(2, 4)
    features = np.stack([near, near, far, near, near, near, far, -near])
    out = SparseTokenMerger(WIDTH)(slide(features, at), 100)
    sizes = sorted(out.size[0].tolist())
    assert sizes == [1, 1, 2, 4], "the left window is one token; of the right, its two alike"
    whole = out.rows()[0][out.size[0] == 4][0]
    assert whole[WIDTH:].tolist() == [SIDE, SIDE, 2 * SIDE, 4]
    assert torch.equal(whole[:WIDTH], torch.from_numpy(near).float())


def test_what_is_alike_but_far_apart_merges_only_where_the_budget_asks():
    features, at = np.tile(np.eye(WIDTH)[0], (2, 1)), np.array([[0.0, 0.0], [40.0, 3.0]])
    merger = SparseTokenMerger(WIDTH)
    assert merger(slide(features, at), 2).size.tolist() == [[1, 1]]
    assert merger(slide(features, at), 1).size.tolist() == [[2]]


def test_a_budget_is_used_up_where_patches_differ():
    rng = np.random.default_rng(0)
    tokens = slide(rng.normal(size=(400, 64)), grid(20, 20))
    for budget in (400, 399, 150, 7, 1):
        assert SparseTokenMerger(64)(tokens, budget).size.shape[1] == budget


def test_slides_of_a_batch_are_apart_and_padding_is_none():
    first, second = made(5, 5, 0.5, 1.0, 0), made(3, 2, 0.5, 1.0, 1)
    both = Tokens.from_rows([first.rows()[0], second.rows()[0]])
    out = SparseTokenMerger(WIDTH)(both, 4)
    for alone, row in zip((first, second), out.rows(), strict=True):
        assert torch.equal(SparseTokenMerger(WIDTH)(alone, 4).rows()[0], row)


@pytest.mark.parametrize("kind", ["noise", "equal", "zero"])
def test_sixteen_thousand_patches_take_seconds(kind):
    rng = np.random.default_rng(0)
    features = {"noise": rng.normal(size=(16384, 1280)), "equal": np.ones((16384, 1280))}.get(
        kind, np.zeros((16384, 1280))
    )
    tokens = slide(features, grid(128, 128))
    start = time.perf_counter()
    out = SparseTokenMerger(1280)(tokens, 128)
    # 1.4 s on one core; the limit is far off, for machines that are busy.
    assert time.perf_counter() - start < 20
    assert out.size.shape == (1, 128) and out.size.sum() == 16384


@pytest.mark.parametrize("options", [{"window": 1}, {"threshold": 1.5}, {"threshold": -1}, {"most": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(InputError, match=f"stm: {next(iter(options))}"):
        make_compressor({"name": "stm", **options}, WIDTH, 32)


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        SparseTokenMerger(WIDTH)(made(2, 2, 0.1, 1.0, 0), 0)
