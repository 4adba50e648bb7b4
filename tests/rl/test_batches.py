from __future__ import annotations

import pytest
import torch

from frugalpath.rl.batches import LoadedOnce, shuffle_groups, split_silent


def test_shuffling_keeps_groups_together():
    index = [4, 4, 4, 0, 0, 0, 0, 2]
    batch = {
        "completion_ids": torch.arange(8)[:, None],
        "advantages": torch.arange(8) * 10,
        "prompt_index": torch.tensor(index),
        "num_items_in_batch": torch.tensor(7),
        "nothing": None,
    }
    orders = set()
    for _ in range(40):
        out = shuffle_groups(batch)
        order = out["completion_ids"][:, 0]
        orders.add(tuple(order.tolist()))
        assert sorted(order.tolist()) == list(range(8))
        for group in ([0, 1, 2], [3, 4, 5, 6], [7]):
            at = order.tolist().index(group[0])
            assert order[at : at + len(group)].tolist() == group
        assert torch.equal(out["advantages"], order * 10)
        assert out["prompt_index"].tolist() == [index[row] for row in order]
        assert out["num_items_in_batch"] == 7 and out["nothing"] is None
    assert len(orders) == 6


def test_a_row_is_loaded_once_for_a_batch_and_the_same_batch_after_it():
    class Counted:
        loads: list[int] = []

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> str:
            self.loads.append(index)
            return f"row {index}"

    data = LoadedOnce(Counted())
    for _ in range(2):
        assert data.__getitems__([3, 3, 1, 1]) == ["row 3", "row 3", "row 1", "row 1"]
    assert Counted.loads == [3, 1]
    assert data.__getitems__([1, 2]) == ["row 1", "row 2"] and data.__getitems__([3]) == ["row 3"]
    assert Counted.loads == [3, 1, 2, 3]
    assert len(data) == 5 and data[4] == "row 4"


@pytest.mark.parametrize(
    "advantages",
    [[0.0, 0.0, 0.0, -1.0, 0.0, 0.5], [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0], [0.5, 0.0]]],
    ids=["rows", "tokens"],
)
def test_a_group_teaches_if_any_of_its_rows_has_an_advantage(advantages):
    groups = [[0, 2], [1, 3], [4], [5]]
    assert split_silent(groups, torch.tensor(advantages)) == ([1, 3, 5], [[0, 2], [4]])
