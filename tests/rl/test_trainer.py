from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from frugalpath.rl.joint import FrugalTrainer
from frugalpath.rl.rollout_trainer import RolloutTrainer
from frugalpath.rl.text_allocator import TextTrainer
from frugalpath.rl.trainer import GroupTrainer
from tests.rl.qwen import make_trainer

# Parameters of TRL 1.16's methods that GroupTrainer and FrugalTrainer override, `self` left out.
OVERRIDDEN = {
    "_tokenize_prompts": "prompts",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "training_step": "model inputs num_items_in_batch",
    "_prepare_inputs": "generation_batch",
    "_get_per_token_logps_and_entropies": (
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
    "_compute_loss": "model inputs",
    "prediction_step": "model inputs prediction_loss_only ignore_keys",
    "floating_point_ops": "inputs",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_train_sampler": "dataset",
    "_save_checkpoint": "model trial",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trl_still_has_the_methods_that_are_overridden(name):
    method = getattr(GRPOTrainer, name, None)
    stock = [] if method is None else list(inspect.signature(method).parameters)[1:]
    found = f"takes {', '.join(stock)}" if method else "is gone"
    assert stock == OVERRIDDEN[name].split(), (
        f"TRL's GRPOTrainer.{name} {found}; rl/rollout_trainer.py, rl/trainer.py and rl/joint.py were written for "
        f"{', '.join(OVERRIDDEN[name].split())}: adapt the override, then this list and the range of trl in "
        "pyproject.toml"
    )


@pytest.mark.parametrize("kind", [RolloutTrainer, GroupTrainer, FrugalTrainer, TextTrainer])
def test_every_override_of_trl_is_watched(kind):
    own = {n for n, v in vars(kind).items() if callable(v) and hasattr(GRPOTrainer, n)}
    assert own - set(OVERRIDDEN) <= {"__init__"}


def test_every_watched_method_is_overridden():
    assert set(OVERRIDDEN) <= {*vars(RolloutTrainer), *vars(GroupTrainer), *vars(FrugalTrainer), *vars(TextTrainer)}


@pytest.fixture
def rollout(performer, cases) -> dict[str, Any]:
    """Groups of two rows at 4 and 16 tokens and one of a single row without an image; ragged completions."""
    prompts = [performer.prompt(cases[0], 4), performer.prompt(cases[2], 16), performer.prompt(cases[1], 0)]
    rows = [0, 0, 1, 1, 2]
    width = max(map(len, prompts))
    pad = performer.processor.tokenizer.pad_token_id
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for row, at in enumerate(rows):
        ids[row, width - len(prompts[at]) :] = prompts[at].ids
        mask[row, width - len(prompts[at]) :] = 1
    valid = torch.arange(6) < torch.tensor([5, 2, 1, 6, 3])[:, None]
    completions = torch.randint(10, 200, valid.shape).masked_fill(~valid, pad)
    return {
        "prompts": prompts,
        "rows": rows,
        "valid": valid,
        "input_ids": torch.cat([ids, completions], 1),
        "attention_mask": torch.cat([mask, valid.long()], 1),
    }


@pytest.mark.parametrize("batch_size", [None, 2])
def test_shared_prefixes_of_stored_features_change_neither_values_nor_gradients(
    performer, make_trainer, rollout, batch_size
):
    trainer = make_trainer(performer, temperature=0.8)
    trainer.model.train()
    trainer._batch.prompts, trainer._batch.rows, valid = (
        rollout.pop("prompts"),
        rollout.pop("rows"),
        rollout.pop("valid"),
    )
    weight = torch.randn(valid.shape) * valid
    found = {}
    for shared in (False, True):
        trainer.args.shared_prefix = shared
        trainer.model.zero_grad()
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, **rollout, logits_to_keep=6, batch_size=batch_size, compute_entropy=True
        )
        (logps * weight + 0.1 * entropies * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found[shared] = (logps.detach() * valid, entropies.detach() * valid, gradients)
    (logps, entropies, gradients), (own_logps, own_entropies, own_gradients) = found[False], found[True]
    assert logps[valid].max() < 0 and entropies[valid].min() > 0
    torch.testing.assert_close(own_logps, logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_entropies, entropies, rtol=1e-5, atol=1e-6)
    assert own_gradients.keys() == gradients.keys() and any("aligner" in n for n in gradients)
    for name, gradient in gradients.items():
        # A bias of keys has no effect on attention, so its gradient is rounding only.
        scale = max(gradient.norm().item(), 1e-3)
        assert (own_gradients[name] - gradient).norm().item() < 1e-5 * scale, name


def test_rollouts_of_a_prompt_read_once_are_those_of_separate_prompts(make_performer, make_trainer, cases):
    """Near temperature 0 sampling is the argmax, so both ways of generation must write the same."""
    performer = make_performer()
    trainer = make_trainer(performer, temperature=1e-4, generation_kwargs=None)
    trainer.model.train()
    trainer._batch.prompts = [performer.prompt(c, b) for c, b in [(cases[0], 4), (cases[2], 16), (cases[1], 1)]]
    trainer._batch.rows = [0, 0, 1, 1, 2, 2]
    ids = [trainer._batch.prompts[i].ids.tolist() for i in trainer._batch.rows]
    written = {}
    for once in (False, True):
        trainer.args.prefill_once = once
        written[once], _ = trainer._generate_single_turn(ids, None, {}, 2)
    assert written[True] == written[False]
    assert len({tuple(row) for row in written[True]}) > 1, "what is written depends on the prompt"


def test_an_image_token_is_never_written_whatever_else_is_banned(tmp_path):
    trainer = make_trainer(GroupTrainer, str(tmp_path), generation_kwargs={"suppress_tokens": [7, 5]})
    image = trainer.processing_class.image_token_id
    assert trainer.generation_config.suppress_tokens == sorted([5, 7, image])
    assert trainer.generation_kwargs["suppress_tokens"] == sorted([5, 7, image])
