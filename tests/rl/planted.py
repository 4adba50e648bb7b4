"""What a decider needs of a run, in the miniature world: scores are planted, answers and their costs are real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from frugalpath.allocator.network import AllocatorConfig
from frugalpath.allocator.objectives import Objective
from frugalpath.allocator.score_table import ScoreTable, score_table
from frugalpath.allocator.value import ValueAllocator
from frugalpath.envs.case import Case
from frugalpath.models.performer import Performer
from frugalpath.recipe.run import AllocatorOptions
from tests.conftest import WIDTH

BUDGETS = [1, 5, 21]
PRICES = [0.0, 0.02, 0.1, 0.4, 3.0]


def planted(
    make_performer: Callable[..., Performer], cases: Sequence[Case], folder: Path
) -> tuple[SimpleNamespace, Performer, ValueAllocator]:
    """Stand-in of a run's stages, its performer (nested tokens) and its jointly trained allocator."""
    performer = make_performer(compressors=[{"name": "pool", "nested": True}])
    performer.model.eval()
    performer.model.generation_config.eos_token_id = 299  # answers of some length
    pair = Case("pair", "p9", "choice", "Which?", "normal", images=("field0", "field1"), options=("normal", "tumour"))
    splits = {"val": [*cases, pair], "test": [*cases[:3], pair]}
    torch.manual_seed(0)
    config = AllocatorConfig(ladder=BUDGETS, look=(1,), feature_dim=WIDTH, width=16, buckets=64)
    allocator = ValueAllocator(config)
    tables: dict[str, ScoreTable] = {}

    def scorer(texts, members, budgets, visual):
        return np.array([(len(m.prompt) + b) % 3 / 2 for m, b in zip(members, budgets, strict=True)])

    def table(name, trained, split):
        if split not in tables:
            tables[split] = score_table(trained, splits[split], BUDGETS, scorer, 5)
        return tables[split]

    def rung_cost(trained):
        flops = [sum(trained.flops(trained.prompt(c, b), 5) for c in cases) for b in BUDGETS]
        return [f / flops[-1] for f in flops]

    run = SimpleNamespace(
        ladder=BUDGETS,
        folder=folder,
        evaluation=SimpleNamespace(prices=PRICES),
        allocator=AllocatorOptions(look=[1], fit_epochs=3, fit_learning_rate=1e-2),
        grpo=SimpleNamespace(seed=0),
    )
    stages = SimpleNamespace(
        run=run,
        splits=splits,
        table=table,
        rung_cost=rung_cost,
        objective=lambda trained: Objective("linear", tuple(BUDGETS), tuple(rung_cost(trained))),
        grpo_parts=dict,
        max_new_tokens=5,
        is_main=True,
    )
    return stages, performer, allocator
