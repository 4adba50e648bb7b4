"""A joint trainer over the miniature world."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.online import AllocatorLearner, PolicyLearner, ValueLearner
from frugalpath.allocator.policy import PolicyConfig, PolicyNetwork
from frugalpath.allocator.value import ValueNetwork
from frugalpath.envs.case import case_columns
from frugalpath.models.performer import Performer
from frugalpath.recipe.checkpoints import train_from
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.rewards.registry import get_rewards
from frugalpath.rl.joint import FrugalTrainer
from tests.conftest import LADDER, WIDTH
from tests.rl.qwen import SHORT_RUN

COST = (0.1, 0.3, 1.0)


@pytest.fixture(scope="session", autouse=True)
def quick_collection() -> Iterator[None]:
    """Leaves what the libraries hold out of the collections that every training starts with: half of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make_learner() -> Callable[..., AllocatorLearner]:
    """A learner of a performer's cases, always of the same weights."""

    def make(performer: Performer, form: str = "value", **options) -> AllocatorLearner:
        torch.manual_seed(1)
        shape = {"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64}
        objective = Objective("linear", LADDER, COST)
        if form == "policy":
            config = PolicyConfig((0.01, 1.0), **shape)
            return PolicyLearner(PolicyNetwork(config), AllocatorInputs(performer, config), objective, **options)
        config = AllocatorConfig(**shape)
        return ValueLearner(ValueNetwork(config), AllocatorInputs(performer, config), objective, **options)

    return make


@pytest.fixture
def make_trainer(cases, make_learner, tmp_path) -> Callable[..., FrugalTrainer]:
    """A trainer whose batch is 2 images x 2 budgets x 2 completions, of the cases `shown` or those of the bank."""

    def make(
        performer: Performer, peft_config=None, form: str = "value", shown=None, rewards=None, **changes
    ) -> FrugalTrainer:
        asked = shown or cases
        options = {
            **SHORT_RUN,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 8,
            "num_generations": 2,
            "budgets_per_image": 2,
            # One in nine tokens ends a completion, so that completions differ in length.
            "generation_kwargs": {"suppress_tokens": [3, *range(10, len(performer.processor.tokenizer))]},
            "max_steps": 3,
        }
        rewards = get_rewards(
            rewards or [{"name": "format", "params": {"soft": True}}, "choice", "tests.rl.conftest:even_tokens"]
        )
        rows = [{"index": i, "prompt": performer.messages(c), **case_columns(c)} for i, c in enumerate(asked)]
        return FrugalTrainer(
            model=performer.model,
            reward_funcs=rewards,
            args=FrugalConfig(**{**options, **changes}),
            train_dataset=Dataset.from_list(rows),
            processing_class=performer.processor,
            peft_config=peft_config,
            performer=performer,
            cases=asked,
            learner=make_learner(performer, form),
            score_weights=[r.score_weight for r in rewards],
        )

    return make


def even_tokens(completions, completion_ids, **columns) -> list[float]:
    """A reward that tells apart what an untrained performer writes: the share of even tokens."""
    return [sum(t % 2 == 0 for t in ids) / max(1, len(ids)) for ids in completion_ids]


def odd_cases(completions, index, fails=False, **columns) -> list[float | None]:
    """A reward that does not apply to cases of even number, or fails on them."""
    if fails and any(i % 2 == 0 for i in index):
        raise ConnectionError("no answer")
    return [None if i % 2 == 0 else 1.0 for i in index]


def never(completions, fails=False, **columns) -> list[float | None]:
    """A reward that applies to nothing, or that always fails."""
    if fails:
        raise ConnectionError("no answer")
    return [None] * len(completions)


def whole_and_resumed(
    make: Callable[..., FrugalTrainer], folder: Path, at: int, last: int = 4, **options
) -> list[FrugalTrainer]:
    """Two trainers after their last step: one that ran all, one that went on from another's checkpoint at a step."""
    ends = []
    for cut in (False, True):
        own = {"output_dir": str(folder / f"cut{cut}"), "max_steps": last, "save_strategy": "steps", **options}
        if cut:
            make(**{**own, "max_steps": at}).train()
        trainer = make(**own)
        train_from(trainer, f"{own['output_dir']}/checkpoint-{at}" if cut else None)
        ends.append(trainer)
    return ends


def assert_same_weights(whole: FrugalTrainer, resumed: FrugalTrainer) -> None:
    """Of performer and allocator."""
    for end, again in ((whole.model, resumed.model), (whole.learner.allocator, resumed.learner.allocator)):
        for name, value in end.state_dict().items():
            found = again.state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
