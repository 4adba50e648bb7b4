"""Who learns when: in turns, or the allocator after the performer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from frugalpath.allocator.frozen import FrozenAnswers, Plan, learn_from_frozen
from frugalpath.recipe.checkpoints import Clock, last_whole
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.rewards.registry import get_rewards
from frugalpath.rewards.scoring import Scorer
from frugalpath.rl.rollout import Rollout
from tests.conftest import LADDER
from tests.rl.conftest import assert_same_weights, whole_and_resumed


class Watch(TrainerCallback):
    """Keeps weights and optimizer as they are at the beginning and after every step."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.performer, self.allocator, self.moments, self.gradients = [], [], [], []

    def _look(self) -> None:
        self.performer.append(copy.deepcopy(self.trainer.model.state_dict()))
        self.allocator.append(copy.deepcopy(self.trainer.learner.allocator.state_dict()))
        optimizer = self.trainer.optimizer
        state = {} if optimizer is None else optimizer.state_dict()["state"]
        self.moments.append([value["exp_avg"].clone() for value in state.values()])

    def on_train_begin(self, *args, **kwargs):
        self._look()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.gradients.append([p.grad for p in self.trainer.model.parameters() if p.grad is not None])

    def on_step_end(self, *args, **kwargs):
        self._look()


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"beta": 0.05}, {"steps_per_generation": 2, "gradient_accumulation_steps": 1}]
)
def test_in_turns_one_learns_and_the_other_stays_bit_for_bit(
    make_performer, make_trainer, tmp_path, changes, monkeypatch
):
    performer = make_performer()
    performer.save(tmp_path / "start")
    performer = type(performer).load(tmp_path / "start", performer.bank, show_options=False)
    if "steps_per_generation" in changes:
        changes = {**changes, "per_device_train_batch_size": 4}
    trainer = make_trainer(performer, mode="alternating", alternate_every=2, max_steps=6, **changes)
    forwards: list[int] = []
    own = Rollout.forwards
    monkeypatch.setattr(Rollout, "forwards", lambda *a: forwards.append(trainer.state.global_step) or own(*a))
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    for step, performers in enumerate([True, True, False, False, True, True]):
        assert equal(watch.performer[step], watch.performer[step + 1]) != performers, step
        if performers:
            assert equal(watch.allocator[step], watch.allocator[step + 1]), step
            assert watch.gradients[step]
        else:
            assert not watch.gradients[step]
            pairs = zip(watch.moments[step], watch.moments[step + 1], strict=True)
            assert all(torch.equal(before, after) for before, after in pairs)
    assert not equal(watch.allocator[2], watch.allocator[4]), "the allocator learnt in its turn"
    assert set(forwards) == {0, 1, 4, 5}, "nothing is read for an update that is not made"
    learnt = {row["step"] for row in trainer.state.log_history if "allocator/loss" in row}
    assert learnt <= {3, 4} and learnt


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["alternating", "sequential"])
def test_a_resumed_run_ends_where_the_whole_run_ends(make_performer, make_trainer, tmp_path, mode):
    options = {"save_steps": 1, "mode": mode, "alternate_every": 2}
    ends = whole_and_resumed(lambda **own: make_trainer(make_performer(), **own), tmp_path, 3, **options)
    assert_same_weights(*ends)


def test_in_sequence_the_allocator_does_not_learn_with_the_performer(make_performer, make_trainer):
    trainer = make_trainer(make_performer(), mode="sequential")
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert equal(watch.allocator[0], watch.allocator[-1]) and not equal(watch.performer[0], watch.performer[-1])


@pytest.fixture
def answers(performer):
    """Greedy answers of an untrained performer; half of the longest ones count as right."""
    scorer = Scorer(get_rewards(["tests.rl.test_modes:writes_much"]), LADDER[-1])
    return FrozenAnswers(performer, scorer, 4)


def writes_much(completions, tokens, **columns) -> list[float]:
    """A reward that tells budgets apart."""
    return [min(1.0, 0.2 + n / 16) for n in tokens]


def test_the_frozen_performer_answers_each_case_and_budget_once(performer, answers, cases, monkeypatch, tmp_path):
    asked = []
    own = performer.answer
    monkeypatch.setattr(
        performer, "answer", lambda c, b, *rest: asked.extend(zip(c, b, strict=True)) or own(c, b, *rest)
    )
    first = answers([cases[0], cases[1], cases[0], cases[0]], [4, 4, 16, 4])
    assert len(asked) == 3 and first[0] is first[3]
    assert [s.answer.visual for s in first] == [4, 4, 16, 4]
    flops = answers.flops
    again = answers(cases[:2], [16, 4], together=True)
    assert len(asked) == 3 and again[0] is first[2] and answers.flops == flops
    assert flops == sum(s.answer.flops for s in first[:3])
    stranger = FrozenAnswers(performer, answers.scorer, 4)
    answers.save(tmp_path / "answers.jsonl")
    stranger.load(tmp_path / "answers.jsonl")
    assert stranger.known == answers.known


def test_the_allocator_learns_from_the_frozen_performer_and_resumes(
    performer, answers, cases, make_learner, tmp_path, monkeypatch
):
    before = copy.deepcopy(performer.model.state_dict())
    ends, logs = [], []
    for cut in (False, True):
        folder = tmp_path / f"cut{cut}"
        seen: list[int] = []

        def learn(steps: int, learner, known: FrozenAnswers, folder=folder, seen=seen):
            resumed = last_whole(folder)
            plan = Plan(steps, images=3, budgets=2, seed=0, save_steps=2, log_steps=3)
            return learn_from_frozen(
                learner, known, cases, plan, folder, resumed, Clock(resumed), lambda step, row: seen.append(step)
            )

        learner = make_learner(performer)
        start = copy.deepcopy(learner.allocator.state_dict())
        if cut:
            learn(5, learner, FrozenAnswers(performer, answers.scorer, 4))
            learner, seen[:] = make_learner(performer), []
        known = FrozenAnswers(performer, answers.scorer, 4)
        logs.append(learn(8, learner, known))
        ends.append(learner.allocator.state_dict())
        assert seen == [3, 6, 8] and [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-8"]
        assert known.flops == pytest.approx(sum(s.answer.flops for s in known.known.values()))
    assert equal(*ends) and not equal(start, ends[0])
    assert logs[0] == logs[1] and "allocator/loss" in logs[0][0]
    assert equal(before, performer.model.state_dict())


def test_bad_modes_are_refused(tmp_path):
    options = {"output_dir": str(tmp_path), "num_generations": 2, "per_device_train_batch_size": 8, "bf16": False}
    with pytest.raises(ValueError, match="mode 'jointly' is unknown; use one of joint, alternating, sequential"):
        FrugalConfig(**options, mode="jointly")
    with pytest.raises(ValueError, match="alternate_every is 0 steps"):
        FrugalConfig(**options, mode="alternating", alternate_every=0)
