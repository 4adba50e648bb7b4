from __future__ import annotations

import json

import numpy as np
import pytest

from frugalpath.rewards.retrieval import RANKS, first_ranks, retrieval

WAYS = ("slide_to_text", "slide_to_distinct_text", "text_to_slide", "distinct_text_to_slide")


def patients(n: int) -> list[str]:
    return [f"p{i // 2}" for i in range(n)]


def test_right_pairs_first_is_recall_one_everywhere():
    n = 40
    found = retrieval(np.eye(n), [f"text {i}" for i in range(n)], patients(n), resamples=100)
    assert (found["pairs"], found["distinct_texts"], found["patients"]) == (40, 40, 20)
    for way in WAYS:
        assert found[way]["pool"] == 40 and found[way]["median_rank"] == 1
        for k in RANKS:
            assert found[way][f"recall@{k}"] == {"value": 1, "ci95": [1, 1], "chance": pytest.approx(k / n)}
    json.dumps(found)


def test_ranks_of_a_known_table():
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.7, 0.9], [0.3, 0.3, 0.3]])
    hits = np.eye(3, dtype=bool)
    # The last scores all alike: a model that cannot tell candidates apart is not credited.
    np.testing.assert_array_equal(first_ranks(scores, hits), [1, 3, 3])
    found = retrieval(scores, ["a", "b", "c"], ["p", "q", "r"], resamples=50)
    assert found["slide_to_text"]["median_rank"] == 3
    assert found["slide_to_text"]["recall@1"]["value"] == pytest.approx(1 / 3)
    assert found["slide_to_text"]["recall@3"]["value"] == 1
    # By columns: a is 1st of 0.9, 0.8, 0.3; b 1st of 0.5, 0.7, 0.3; c 2nd of 0.1, 0.9, 0.3.
    assert found["text_to_slide"]["recall@1"]["value"] == pytest.approx(2 / 3)
    assert found["text_to_slide"]["median_rank"] == 1


def test_an_equal_text_is_a_hit():
    texts = ["same", "same", "other"]
    scores = np.array([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 1.0]])
    found = retrieval(scores, texts, ["p", "q", "r"], resamples=50)
    assert found["distinct_texts"] == 2
    for way in ("slide_to_text", "text_to_slide"):
        assert found[way]["recall@1"]["value"] == 1
        # Two of three candidates are right for two queries, one of three for the third.
        assert found[way]["recall@1"]["chance"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_a_text_that_many_slides_share_asks_once():
    texts = ["common"] * 8 + ["rare", "rarer"]
    # Both rare texts find a slide of the common one first.
    scores = np.zeros((10, 10))
    scores[0] = 1
    found = retrieval(scores, texts, patients(10), resamples=50)
    assert found["text_to_slide"]["recall@1"]["value"] == pytest.approx(0.8)
    assert found["text_to_slide"]["queries"] == 10
    distinct = found["distinct_text_to_slide"]
    assert (distinct["queries"], distinct["pool"]) == (3, 10)
    assert distinct["recall@1"]["value"] == pytest.approx(1 / 3)
    assert distinct["recall@1"]["chance"] == pytest.approx((0.8 + 0.1 + 0.1) / 3)


def test_copies_of_a_wrong_text_fill_the_pool_of_pairs_but_not_that_of_texts():
    texts = ["common"] * 5 + ["rare"]
    scores = np.tile(np.array([0.9] * 5 + [0.8]), (6, 1))
    found = retrieval(scores, texts, patients(6), resamples=50)
    assert found["slide_to_text"]["recall@5"]["value"] == pytest.approx(5 / 6)
    assert found["slide_to_distinct_text"]["recall@3"]["value"] == 1
    assert found["slide_to_distinct_text"]["pool"] == 2


def test_random_scores_give_the_chance_that_is_stated():
    rng = np.random.default_rng(0)
    n = 300
    texts = [f"text {i}" for i in rng.integers(0, 60, n)]
    found = retrieval(rng.random((n, n)), texts, [str(i) for i in range(n)], resamples=200)
    # In one way each slide has its own order: 300 draws. Distinct texts: one hit among 60.
    for way in WAYS:
        for k in RANKS:
            recall = found[way][f"recall@{k}"]
            error = np.sqrt(recall["chance"] * (1 - recall["chance"]) / found[way]["queries"])
            assert abs(recall["value"] - recall["chance"]) < 4 * error, (way, k)
            assert recall["ci95"][0] <= recall["value"] <= recall["ci95"][1]
    assert found["slide_to_distinct_text"]["recall@3"]["chance"] == pytest.approx(3 / found["distinct_texts"])


def test_recall_grows_with_the_rank_and_small_pools_are_possible():
    rng = np.random.default_rng(1)
    found = retrieval(rng.random((4, 4)), list("abcd"), list("pqrs"), resamples=50)
    for way in WAYS:
        values = [found[way][f"recall@{k}"]["value"] for k in RANKS]
        assert values == sorted(values) and values[-1] == 1
        assert found[way]["recall@10"]["chance"] == 1


def test_slides_of_a_patient_widen_the_interval():
    n = 200
    order = np.random.default_rng(0).integers(0, 2, n // 10).repeat(10)
    scores = np.where(order[:, None] == 1, np.eye(n), -np.eye(n))
    wide = retrieval(scores, [str(i) for i in range(n)], [str(i // 10) for i in range(n)])
    narrow = retrieval(scores, [str(i) for i in range(n)], [str(i) for i in range(n)])
    width = [np.diff(f["slide_to_text"]["recall@1"]["ci95"])[0] for f in (wide, narrow)]
    assert 2.5 < width[0] / width[1] < 3.8


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(ValueError, match="2 texts"):
        retrieval(np.eye(3), ["a", "b"], ["p", "q"])
    with pytest.raises(ValueError, match="NaN"):
        retrieval(np.full((1, 1), np.nan), ["a"], ["p"])
    with pytest.raises(ValueError, match="no cases"):
        retrieval(np.zeros((0, 0)), [], [])
