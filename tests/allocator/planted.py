"""What a decider needs of a run, in the miniature world: scores are planted, answers and their costs are real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from frugalpath.allocator.base import TrainedRun
from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.score_table import score_table
from frugalpath.allocator.value import ValueNetwork
from frugalpath.envs.case import Case
from frugalpath.models.performer import Performer
from frugalpath.recipe.run import AllocatorOptions
from tests.conftest import WIDTH

BUDGETS = [1, 5, 21]
PRICES = [0.0, 0.02, 0.1, 0.4, 3.0]


def planted(
    make_performer: Callable[..., Performer], cases: Sequence[Case], folder: Path
) -> tuple[TrainedRun, ValueNetwork]:
    """A run whose performer (nested tokens) is trained, and its jointly trained network."""
    performer = make_performer(compressors=[{"name": "pool", "nested": True}])
    performer.model.eval()
    performer.model.generation_config.eos_token_id = 299  # answers of some length
    pair = Case("pair", "p9", "choice", "Which?", "normal", images=("field0", "field1"), options=("normal", "tumour"))
    splits = {"val": [*cases, pair], "test": [*cases[:3], pair]}
    torch.manual_seed(0)
    config = AllocatorConfig(ladder=BUDGETS, look=(1,), feature_dim=WIDTH, width=16, buckets=64)
    allocator = ValueNetwork(config)

    def scorer(texts, members, budgets, visual):
        return np.array([(len(m.prompt) + b) % 3 / 2 for m, b in zip(members, budgets, strict=True)])

    tables = {split: score_table(performer, members, BUDGETS, scorer, 5) for split, members in splits.items()}
    flops = [sum(performer.flops(performer.prompt(c, b), 5) for c in cases) for b in BUDGETS]
    objective = Objective("linear", tuple(BUDGETS), tuple(f / flops[-1] for f in flops))

    run = SimpleNamespace(
        ladder=BUDGETS,
        folder=folder,
        evaluation=SimpleNamespace(prices=PRICES),
        allocator=AllocatorOptions(look=[1], fit_epochs=3, fit_learning_rate=1e-2),
        grpo=SimpleNamespace(seed=0),
    )
    data = SimpleNamespace(run=run, splits=splits, max_new_tokens=5)
    return TrainedRun(data, performer, objective, tables), allocator
