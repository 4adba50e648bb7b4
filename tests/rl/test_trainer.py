from __future__ import annotations

import copy
import inspect

import pytest
import torch
from trl import GRPOTrainer

from models.performer import SlidePerformer
from rewards.registry import gold_completion
from rl.config import FrugalConfig
from rl.joint import FrugalTrainer
from rl.trainer import shuffle_groups
from slides.errors import InputError
from tests.conftest import LADDER
from tests.rl.conftest import even_tokens

# Parameters of TRL 1.16's methods that FrugalTrainer overrides, `self` left out.
OVERRIDDEN = {
    "_get_per_token_logps_and_entropies": (
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids"
    ),
    "_prepare_inputs": "generation_batch",
    "_generate_single_turn": "prompt_ids images multimodal_fields num_generations has_tool_images",
    "_generate_and_score_completions": "inputs",
    "_calculate_rewards": "inputs prompts completions completion_ids_list",
    "_get_train_sampler": "dataset",
    "_save_checkpoint": "model trial",
    "_load_from_checkpoint": "resume_from_checkpoint model",
}


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trl_still_has_the_methods_that_are_overridden(name):
    stock = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)[1:]
    assert stock == OVERRIDDEN[name].split(), (
        f"TRL's GRPOTrainer.{name} takes {', '.join(stock)}; rl/trainer.py was written for "
        f"{', '.join(OVERRIDDEN[name].split())}: adapt its override, then this list and the range in pyproject.toml"
    )


def test_every_override_of_trl_is_watched():
    own = {n for n, v in vars(FrugalTrainer).items() if callable(v) and hasattr(GRPOTrainer, n)}
    assert own - set(OVERRIDDEN) == {"__init__", "floating_point_ops"}


@pytest.fixture
def rollout(performer, cases) -> dict:
    """Two groups of two rows at 4 and 16 tokens and one without an image; left-padded prompts, ragged completions."""
    picked = [(cases[0], 4), (cases[0], 4), (cases[2], 16), (cases[2], 16), (cases[1], 0), (cases[1], 0)]
    seen = [performer.see(c, b) for c, b in picked]
    text = performer.processor.apply_chat_template(
        [performer.messages(c, v) for (c, _), v in zip(picked, seen, strict=True)], add_generation_prompt=True
    )
    prompt = performer.processor(images=seen, text=text, padding=True, return_tensors="pt")
    lengths = torch.tensor([5, 2, 1, 6, 3, 4])
    valid = torch.arange(6) < lengths[:, None]
    ids = torch.randint(10, 200, (6, 6)).masked_fill(~valid, performer.processor.tokenizer.pad_token_id)
    return {
        "input_ids": torch.cat([prompt["input_ids"], ids], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], valid.long()], 1),
        "pixel_values": prompt["pixel_values"],
        "image_grid_thw": prompt["image_grid_thw"],
        "num_images": [len(v) for v in seen],
        "valid": valid,
    }


@pytest.mark.parametrize("batch_size", [None, 2])
def test_shared_prefixes_change_neither_values_nor_gradients(performer, make_trainer, rollout, batch_size):
    trainer = make_trainer(performer, temperature=0.8)
    trainer.model.train()
    valid = rollout.pop("valid")
    weight = torch.randn(valid.shape) * valid
    found = {}
    for name, shared in (("stock", False), ("shared", True)):
        trainer.args.shared_prefix = shared
        trainer.model.zero_grad()
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, **rollout, logits_to_keep=6, batch_size=batch_size, compute_entropy=True
        )
        (logps * weight + 0.1 * entropies * weight).sum().backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found[name] = (logps.detach() * valid, entropies.detach() * valid, gradients)
    (logps, entropies, gradients), (own_logps, own_entropies, own_gradients) = found["stock"], found["shared"]
    assert logps[valid].max() < 0 and entropies[valid].min() > 0
    torch.testing.assert_close(own_logps, logps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_entropies, entropies, rtol=1e-5, atol=1e-6)
    assert own_gradients.keys() == gradients.keys() and any("aligner" in n for n in gradients)
    for name, gradient in gradients.items():
        # A bias of keys has no effect on attention, so its gradient is rounding only.
        scale = max(gradient.norm().item(), 1e-3)
        assert (own_gradients[name] - gradient).norm().item() < 1e-5 * scale, name


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize(("beta", "iterations"), [(0.0, 1), (0.0, 2), (0.05, 2)])
def test_training_with_shared_prefixes_takes_the_same_steps(
    make_performer, make_trainer, bank, tmp_path, loss_type, beta, iterations
):
    make_performer().save(tmp_path / "start")
    logs = {}
    for shared in (False, True):
        # A penalty needs the reference loaded anew from the folder.
        performer = SlidePerformer.load(tmp_path / "start", bank, show_options=False)
        changes = {"loss_type": loss_type, "beta": beta, "num_iterations": iterations}
        trainer = make_trainer(performer, shared_prefix=shared, prefill_once=False, **changes)
        trainer.train()
        logs[shared] = [row for row in trainer.state.log_history if "grad_norm" in row]
    assert len(logs[True]) == len(logs[False]) == 3
    assert max(row["grad_norm"] for row in logs[False]) > 1e-3, "there was something to learn"
    assert logs[False][0]["completions/min_length"] < logs[False][0]["completions/max_length"]
    for own, stock in zip(logs[True], logs[False], strict=True):
        for key in ("loss", "grad_norm", "entropy", *(["kl"] if beta else [])):
            assert own[key] == pytest.approx(stock[key], rel=1e-5, abs=1e-5), key
    if beta:
        assert logs[False][-1]["kl"] > 0


def test_performer_and_allocator_both_learn(make_performer, make_trainer):
    performer = make_performer()
    trainer = make_trainer(performer)
    before = copy.deepcopy(performer.model.state_dict())
    allocator = copy.deepcopy(trainer.learner.allocator.state_dict())
    trainer.train()
    after, learnt = performer.model.state_dict(), trainer.learner.allocator.state_dict()
    for part in ("aligner.place", "aligner.features", "embed_tokens", "layers.0", "lm_head"):
        assert any(not torch.equal(after[n], before[n]) for n in after if part in n), part
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for name in ("see.weight", "question.weight", "head.4.weight"):
        assert not torch.equal(learnt[name], allocator[name]), name
    row = next(r for r in trainer.state.log_history if "allocator/loss" in r)
    assert min(LADDER) <= row["allocator/drawn_tokens"] <= max(LADDER)
    assert 0 < row["allocator/largest_share"] <= 1
    assert trainer.state.total_flos > 0


def test_a_step_takes_every_image_with_its_budgets_and_completions(make_performer, make_trainer, cases):
    trainer = make_trainer(make_performer(), budgets_per_image=2, num_generations=2)
    order = list(trainer._get_train_sampler())
    for start in range(0, len(order), 8):
        first, second = order[start : start + 4], order[start + 4 : start + 8]
        assert len(set(first)) == len(set(second)) == 1 and first != second
    assert sorted(set(order)) == list(range(len(cases)))


def test_rollouts_of_a_prompt_read_once_are_those_of_separate_prompts(make_performer, make_trainer, cases):
    """Near temperature 0 sampling is the argmax, so both ways of generation must write the same."""
    performer = make_performer()
    trainer = make_trainer(performer, temperature=1e-4, generation_kwargs=None)
    trainer.model.train()
    picked = [(cases[0], 4), (cases[2], 16), (cases[1], 1)]
    seen = [performer.see(c, b) for c, b in picked for _ in range(2)]
    messages = [performer.messages(c, performer.see(c, b)) for c, b in picked for _ in range(2)]
    text = performer.processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = performer.processor(images=seen, text=text)
    fields = {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    written = {}
    for once in (False, True):
        trainer.args.prefill_once = once
        written[once], _ = trainer._generate_single_turn(inputs["input_ids"], seen, fields, 2)
    assert written[True] == written[False]
    assert len({tuple(row) for row in written[True]}) > 1, "what is written depends on the prompt"


@pytest.mark.parametrize("once", [True, False])
def test_the_gold_rollout_closes_every_group_and_is_not_scored_for_the_allocator(
    make_performer, make_trainer, cases, monkeypatch, once
):
    trainer = make_trainer(
        make_performer(), gold_rollout=True, num_generations=4, prefill_once=once, per_device_train_batch_size=16
    )
    tokenizer = trainer.performer.processor.tokenizer
    order = list(trainer._get_train_sampler())[:16]
    seen = {}
    monkeypatch.setattr(trainer.learner, "update", lambda *drawn: seen.update(score=drawn[-1]) or {})
    trainer.model.train()
    out = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in order])
    written = tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True)
    gold = [gold_completion({"answer": cases[i].answer}) for i in order]
    assert written[3::4] == gold[3::4]
    assert not set(written[::4]) & set(gold), "an untrained performer does not write the answer"
    assert out["completion_mask"][3].sum() == len(tokenizer(gold[3])["input_ids"]) + 1, "it is ended"
    # No sample is right, so that a score is half the share of even tokens, its mean over the three samples.
    ids = [row[mask.bool()].tolist() for row, mask in zip(out["completion_ids"], out["completion_mask"], strict=True)]
    even = torch.tensor(even_tokens([None] * 16, ids)).view(2, 2, 4)
    torch.testing.assert_close(seen["score"], even[..., :3].mean(-1) / 2)
    assert (out["advantages"].view(4, 4).argmax(1) == 3).all()


def test_a_gold_answer_that_would_be_cut_off_is_refused(make_performer, make_trainer):
    with pytest.raises(InputError, match=r"max_completion_length: 3 tokens, but the gold answer of case case\d takes"):
        make_trainer(make_performer(), gold_rollout=True, max_completion_length=3)


def test_shuffling_keeps_groups_together():
    batch = {
        "completion_ids": torch.arange(12)[:, None],
        "advantages": torch.arange(12) * 10,
        "num_images": list(range(12)),
        "pixel_values": [torch.full((i % 3, 2), float(i)) for i in range(12)],
        "num_items_in_batch": torch.tensor(7),
        "nothing": None,
    }
    orders = set()
    for _ in range(20):
        out = shuffle_groups(batch, 4)
        order = out["completion_ids"][:, 0]
        orders.add(tuple(order.tolist()))
        assert all(g.tolist() in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]) for g in order.split(4))
        assert sorted(order.tolist()) == list(range(12))
        assert torch.equal(out["advantages"], order * 10)
        assert out["num_images"] == order.tolist()
        assert all(torch.equal(p, batch["pixel_values"][i]) for i, p in zip(order, out["pixel_values"], strict=True))
        assert out["num_items_in_batch"] == 7 and out["nothing"] is None
    assert len(orders) == 6


def test_a_batch_that_splits_an_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"= 12 completions .* 4 x 2 = 8; make the first a multiple of 8"):
        FrugalConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=12,
            num_generations=2,
            budgets_per_image=4,
            bf16=False,
        )


def test_a_resumed_run_ends_where_the_whole_run_ends(make_performer, make_trainer, tmp_path):
    ends = []
    for cut in (False, True):
        options = {
            "output_dir": str(tmp_path / f"cut{cut}"),
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        if cut:
            make_trainer(make_performer(), **{**options, "max_steps": 2}).train()
        trainer = make_trainer(make_performer(), **options)
        trainer.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-2" if cut else None)
        ends.append((trainer.model.state_dict(), trainer.learner.allocator.state_dict()))
    for whole, resumed in zip(*ends, strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
