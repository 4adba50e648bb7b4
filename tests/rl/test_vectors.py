"""Advantages, ratios and penalties of the trainer as it runs, against values worked out from the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import RLOOConfig, RLOOTrainer

from frugalpath.rl.trainer import GroupTrainer
from tests.rl.qwen import SHORT_RUN, Forced, make_model, make_processor, make_rows, make_trainer

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


class Ours(Forced, GroupTrainer):
    """Ours on completions that are written for it."""


class Rloo(Forced, RLOOTrainer):
    """TRL's RLOO on the same."""

    def _generate_single_turn(self, prompt_ids: list, *rest: Any) -> list:
        return super()._generate_single_turn(prompt_ids, *rest)[0]


class Fixed:
    """A reward that gives the completions of a group what is set."""

    __name__ = "fixed"
    values = REWARDS

    def __call__(self, completions: list, **columns: Any) -> list[float]:
        return self.values


@pytest.fixture(scope="module")
def reward() -> Fixed:
    return Fixed()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, reward) -> Ours:
    folder = str(tmp_path_factory.mktemp("run"))
    return make_trainer(
        Ours, folder, text_only=True, num_generations=8, per_device_train_batch_size=8, beta=0.0, reward=reward
    )


@pytest.fixture(scope="module")
def rloo(tmp_path_factory, reward) -> Rloo:
    processor = make_processor()
    args = RLOOConfig(
        **SHORT_RUN,
        output_dir=str(tmp_path_factory.mktemp("rloo")),
        per_device_train_batch_size=8,
        num_generations=8,
        beta=0.0,
        max_steps=1,
    )
    return Rloo(
        model=make_model(processor, text_only=True),
        reward_funcs=reward,
        args=args,
        train_dataset=make_rows("text"),
        processing_class=processor.tokenizer,
    )


def advantages(trainer: Any) -> list[float]:
    trainer.model.train()
    return trainer._generate_and_score_completions([dict(trainer.train_dataset[0])] * 8)["advantages"].tolist()


@pytest.mark.parametrize(
    ("scale", "right", "wrong"),
    [("group", 1.619835, -0.539945), ("none", 0.75, -0.25)],
    ids=["GRPO", "Dr.GRPO"],
)
def test_advantages_of_a_group(trainer, reward, monkeypatch, scale, right, wrong):
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    found = advantages(trainer)
    assert found == pytest.approx([right if r else wrong for r in REWARDS], abs=1e-6)
    assert sum(found) == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(reward, "values", REWARDS[::-1])
    assert advantages(trainer) == pytest.approx(found[::-1], abs=1e-6)
    monkeypatch.setattr(reward, "values", [0.3] * 8)
    assert advantages(trainer) == pytest.approx([0.0] * 8, abs=1e-3)


def test_advantages_of_rloo(rloo):
    assert advantages(rloo) == pytest.approx([0.857143 if r else -0.285714 for r in REWARDS], abs=1e-6)


def loss(
    trainer: Ours,
    monkeypatch: pytest.MonkeyPatch,
    advantage: float,
    new: list[float],
    ref: float = 0.0,
    **changes: Any,
) -> float:
    """The trainer's loss of one completion.

    Args:
        new: log-probability of each token under the policy, less that under the old one.
        ref: the same of the reference, for all tokens.
        changes: attributes of the trainer.
    """
    for name, value in changes.items():
        monkeypatch.setattr(trainer, name, value)
    shape = (1, len(new))
    logps = torch.tensor([new], dtype=torch.float64)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *args, **kwargs: (logps, torch.zeros(shape), None)
    )
    trainer.model.eval()
    inputs = {
        "prompt_ids": torch.ones(1, 2, dtype=torch.long),
        "prompt_mask": torch.ones(1, 2, dtype=torch.long),
        "completion_ids": torch.ones(shape, dtype=torch.long),
        "completion_mask": torch.ones(shape, dtype=torch.long),
        "prompt_index": torch.zeros(1, dtype=torch.long),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "old_per_token_logps": torch.zeros(shape, dtype=torch.float64),
        "ref_per_token_logps": torch.full(shape, ref, dtype=torch.float64),
        "num_items_in_batch": torch.tensor(len(new)),
    }
    return trainer._compute_loss(trainer.model, inputs).item()


@pytest.mark.parametrize(
    ("level", "new", "ratio"),
    [
        ("sequence", [0.1, -0.2, 0.3], 1.0689391),  # GSPO
        ("token", [0.1], 1.105171),
        ("token", [-0.2], 0.818731),
        ("token", [0.3], 1.349859),
        ("token", [0.1, -0.2, 0.3], (1.105171 + 0.818731 + 1.349859) / 3),
    ],
)
def test_ratios(trainer, monkeypatch, level, new, ratio):
    wide = {"loss_type": "grpo", "importance_sampling_level": level, "epsilon_low": 0.9, "epsilon_high": 9.0}
    assert loss(trainer, monkeypatch, 1.0, new, **wide) == pytest.approx(-ratio, abs=1e-6)
    assert loss(trainer, monkeypatch, -2.0, new, **wide) == pytest.approx(2 * ratio, abs=2e-6)


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (0.1, 0.00517092), (-0.1, 0.00483742), (1.0, 0.71828183)])
def test_k3(trainer, monkeypatch, x, expected):
    value = loss(trainer, monkeypatch, 0.0, [0.0, 0.0], ref=x, beta=1.0, loss_type="grpo")
    assert value == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(1.0, 1.0, 2.0), (1.0, 1.2, 2.199336), (-1.0, 1.2, 2.104030)],  # tau is 1 for good answers and 1.05 for bad ones
)
def test_sapo(trainer, monkeypatch, advantage, ratio, expected):
    new = torch.tensor(ratio, dtype=torch.float64).log().item()
    value = loss(trainer, monkeypatch, advantage, [new], loss_type="sapo")
    assert value == pytest.approx(-advantage * expected, abs=1e-6)
