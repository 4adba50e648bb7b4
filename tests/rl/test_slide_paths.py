"""The published slide models within the trainers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, lora_config
from tests.models.test_slide_paths import PATHS

LEARNED = ("locpath", "pathalign", "pathosynvlm")


@pytest.fixture
def open_gates():
    """Opens the gates of a performer's cross-attention, so that it looks."""

    def change(performer):
        if performer.model.model.routes is not None:
            with torch.no_grad():
                for adapter in performer.model.model.routes.adapters:
                    adapter.gate.fill_(0.5)
        return performer

    return change


@pytest.mark.parametrize("name", LEARNED)
def test_packed_rows_give_the_log_probabilities_of_separate_ones(name, make_performer, make_trainer, open_gates):
    performer = open_gates(make_performer(**PATHS[name], aligner_dropout=0.0))
    trainer = make_trainer(performer)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._generate_and_score_completions(batch)
    trainer._batch.rows = inputs["prompt_index"].tolist()
    ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    whole = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    packed, _, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.cat([inputs["prompt_ids"], ids], 1), whole, ids.shape[1]
    )
    prompts = [trainer._batch.prompts[row] for row in trainer._batch.rows]
    rows = [torch.cat([p.ids, i[m]]) for p, i, m in zip(prompts, ids, mask, strict=True)]
    seen = performer.processor.sight.inputs(performer.model, [p.views for p in prompts])
    logits = performer.model(
        input_ids=pad_sequence(rows, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(r) for r in rows], batch_first=True),
        **seen,
    ).logits.log_softmax(-1)
    for at, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        places = torch.arange(len(prompt) - 1, len(row) - 1)
        expected = logits[at, places, row[len(prompt) :]]
        assert torch.allclose(packed[at][mask[at]], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("name", LEARNED)
def test_a_path_learns_from_its_rollouts(name, lora, make_performer, make_trainer, open_gates):
    performer = open_gates(make_performer(**PATHS[name], aligner_dropout=0.0))
    before = copy.deepcopy(performer.model.state_dict())
    trainer = make_trainer(performer, peft_config=lora_config(PerformerConfig(lora=lora), performer.model))
    trainer.train()
    assert len(trainer.state.log_history) >= 3
    after = {n.replace(".modules_to_save.default", ""): p for n, p in performer.model.state_dict().items()}
    parts = ["aligner", *(["routes", "learned.0", "learned.1"] if name == "locpath" else [])]
    for part in parts:
        moved = [n for n in before if part in n and n in after and not torch.equal(after[n], before[n])]
        assert moved, part


def test_passes_that_know_rows_alone_are_refused(make_performer, make_trainer):
    performer = make_performer(**PATHS["locpath"])
    trainer = make_trainer(performer, shared_prefix=False)
    with pytest.raises(InputError, match="read by our own passes alone: leave shared_prefix"):
        trainer.train()
