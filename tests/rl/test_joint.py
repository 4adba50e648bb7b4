from __future__ import annotations

import copy

import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.models.performer import SlidePerformer
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.rewards.registry import gold_completion
from tests.conftest import LADDER
from tests.rl.conftest import assert_same_weights, even_tokens, whole_and_resumed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_type", "beta", "iterations"),
    [("grpo", 0.0, 1), ("dapo", 0.0, 2), ("dr_grpo", 0.05, 2), ("bnpo", 0.05, 1)],
)
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
    for part in ("aligner.patches.place", "aligner.patches.features", "embed_tokens", "layers.0", "lm_head"):
        assert any(not torch.equal(after[n], before[n]) for n in after if part in n), part
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for name in ("see.weight", "question.weight", "head.4.weight"):
        assert not torch.equal(learnt[name], allocator[name]), name
    row = next(r for r in trainer.state.log_history if "allocator/loss" in r)
    assert min(LADDER) <= row["allocator/drawn_tokens"] <= max(LADDER)
    assert 0 < row["allocator/largest_share"] <= 1
    assert trainer.state.total_flos > 0


def test_rollouts_that_fail_leave_the_model_in_training(make_performer, make_trainer, monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionError("the device is gone")

    trainer = make_trainer(make_performer())
    trainer.model.train()
    monkeypatch.setattr("frugalpath.rl.rollout_trainer.generate", broken)
    with pytest.raises(ConnectionError):
        trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    assert trainer.model.training


def test_a_system_message_goes_with_the_question(make_performer, make_trainer):
    performer = make_performer()
    performer.system = "You are a pathologist."
    trainer = make_trainer(performer, max_steps=1)
    trainer.train()
    written = performer.processor.tokenizer.decode(trainer._batch.prompts[0].ids)
    assert written.count("You are a pathologist.") == 1


def test_a_step_takes_every_image_with_its_budgets_and_completions(make_performer, make_trainer, cases):
    trainer = make_trainer(make_performer(), budgets_per_image=2, num_generations=2)
    order = list(trainer._get_train_sampler())
    for start in range(0, len(order), 8):
        first, second = order[start : start + 4], order[start + 4 : start + 8]
        assert len(set(first)) == len(set(second)) == 1 and first != second
    assert sorted(set(order)) == list(range(len(cases)))


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
    monkeypatch.setattr(trainer.learner, "update", lambda *drawn: seen.update(score=drawn[3]) or {})
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


@pytest.mark.parametrize("fails", [False, True])
def test_what_no_reward_scores_teaches_the_allocator_nothing(make_performer, make_trainer, monkeypatch, fails):
    spec = {"name": "tests.rl.conftest:odd_cases", "params": {"fails": fails}, "on_error": "none"}
    trainer = make_trainer(make_performer(), rewards=["format", spec], per_device_train_batch_size=16)
    seen = {}
    monkeypatch.setattr(trainer.learner, "update", lambda *drawn: seen.update(score=drawn[3]) or {})
    trainer.model.train()
    order = [i for i in (0, 1, 2, 3) for _ in range(4)]
    trainer._generate_and_score_completions([trainer.train_dataset[i] for i in order])
    assert seen["score"].isnan().all(1).tolist() == [True, False, True, False]
    assert seen["score"][1::2].tolist() == [[1.0, 1.0]] * 2


def test_a_batch_that_no_reward_scores_is_refused_unless_one_failed(make_performer, make_trainer):
    spec = {"name": "tests.rl.conftest:never", "on_error": "none"}
    with pytest.raises(InputError, match=r"case case\d: no reward scores its task 'choice', .*asked: never"):
        make_trainer(make_performer(), rewards=["format", spec]).train()
    trainer = make_trainer(make_performer(), rewards=["format", {**spec, "params": {"fails": True}}], max_steps=1)
    before = copy.deepcopy(trainer.learner.allocator.state_dict())
    trainer.train()
    assert all(torch.equal(v, before[n]) for n, v in trainer.learner.allocator.state_dict().items())


def test_a_gold_answer_that_would_be_cut_off_is_refused(make_performer, make_trainer):
    with pytest.raises(InputError, match=r"max_completion_length: 3 tokens, but the gold answer of case case\d takes"):
        make_trainer(make_performer(), gold_rollout=True, max_completion_length=3)


def test_a_batch_that_splits_an_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"= 12 completions .* 4 x 2 = 8; make the first a multiple of 8"):
        FrugalConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=12,
            num_generations=2,
            budgets_per_image=4,
            bf16=False,
        )


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_run_ends(make_performer, make_trainer, tmp_path):
    ends = whole_and_resumed(lambda **own: make_trainer(make_performer(), **own), tmp_path, 2, save_steps=2)
    assert_same_weights(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 6])
def test_an_epoch_has_the_same_order_in_a_resumed_run(make_performer, make_trainer, tmp_path, at):
    """An epoch is four steps."""
    ends = whole_and_resumed(lambda **own: make_trainer(make_performer(), **own), tmp_path, at, last=7, save_steps=at)
    assert_same_weights(*ends)


@pytest.mark.slow
def test_a_checkpoint_of_the_last_step_is_not_trained_on(make_performer, make_trainer, tmp_path):
    """An epoch is four steps."""
    whole, resumed = whole_and_resumed(
        lambda **own: make_trainer(make_performer(), **own), tmp_path, 3, last=3, save_steps=3
    )
    assert resumed.state.global_step == 3
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2, 3]
    assert_same_weights(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 3},
        {"per_device_train_batch_size": 4, "steps_per_generation": 6, "gradient_accumulation_steps": 2},
    ],
    ids=["iterations", "parts"],
)
def test_a_checkpoint_waits_until_the_rollouts_are_used_up(make_performer, make_trainer, tmp_path, changes):
    """Rollouts are used for three steps."""

    def kept(folder) -> list[int]:
        return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))

    whole, resumed = whole_and_resumed(
        lambda **own: make_trainer(make_performer(), **own, **changes), tmp_path, 3, last=7, save_steps=2
    )
    assert kept(tmp_path / "cutFalse") == kept(tmp_path / "cutTrue") == [3, 6, 7], "due after 2, 4, 6 and the last"
    assert_same_weights(whole, resumed)
