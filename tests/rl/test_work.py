"""GroupTrainer does each piece of work once."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import GRPOTrainer

import frugalpath.rl.rollout_trainer
from frugalpath.errors import InputError
from frugalpath.models.qwen_vl import backbone
from frugalpath.rl.trainer import GroupTrainer
from tests.conftest import needs_features, noise
from tests.rl.qwen import IMAGES, PIXELS, Ours, Stock, Watch, make_rows, make_trainer, steps

OFF_POLICY = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
SHOWN = [(w * h) // PIXELS for sizes in IMAGES["mixed"] for w, h in sizes]
"""Visual tokens of the four images."""


def watched(folder: Any, **changes: Any) -> tuple[Any, Watch, list[dict[str, Any]]]:
    """A trainer that has trained, its forwards, and its generation batches with their prompts."""
    trainer = make_trainer(Ours, str(folder), **changes)
    watch = Watch(trainer)
    batches: list[dict[str, Any]] = []
    stock = trainer._generate_and_score_completions

    def generate(inputs: list) -> dict[str, Any]:
        out = stock(inputs)
        batches.append({**out, "prompts": trainer._batch.prompts})
        return out

    trainer._generate_and_score_completions = generate
    trainer.train()
    return trainer, watch, batches


def packed_tokens(batch: dict[str, Any], taught: bool = False) -> int:
    """Tokens of a batch with each prompt once; of the groups that teach only, if asked."""
    total = 0
    for at, prompt in enumerate(batch["prompts"]):
        rows = batch["prompt_index"] == at
        assert rows.sum() == 4
        if not taught or batch["advantages"][rows].abs().max() > 0:
            total += len(prompt) - 1 + int((batch["completion_mask"][rows].sum(1) + 1).sum())
    return total


@pytest.mark.slow
def test_an_update_reads_each_prompt_once(tmp_path):
    _, watch, batches = watched(tmp_path)
    assert len(batches) == 5 and all(len(b["prompts"]) == 4 for b in batches)
    assert all(p.grad for p in watch.scored)
    assert sum(p.tokens for p in watch.scored) == sum(map(packed_tokens, batches))
    apart = make_trainer(Stock, str(tmp_path))
    seen = Watch(apart)
    apart.train()
    assert sum(p.tokens for p in seen.scored) > 2 * sum(p.tokens for p in watch.scored)


@pytest.mark.slow
def test_the_old_pass_is_the_first_update(tmp_path):
    """Half of the rows are trained on in the second of two steps, so that half of the old pass is needed."""
    found = {}
    for reuse in (True, False):
        for name, changes in (("iterations", {"num_iterations": 2}), ("halves", OFF_POLICY)):
            trainer, watch, batches = watched(tmp_path, reuse_old_logps=reuse, max_steps=4, **changes)
            assert len(batches) == 2
            found[reuse, name] = sum(p.tokens for p in watch.scored if not p.grad), sum(map(packed_tokens, batches))
            assert sum(p.grad for p in watch.scored) >= trainer.state.global_step
    assert found[True, "iterations"][0] == 0
    assert 0 < found[True, "halves"][0] < found[True, "halves"][1]
    for name in ("iterations", "halves"):
        old, whole = found[False, name]
        assert old == whole


@pytest.mark.slow
@pytest.mark.parametrize("skip", [True, False])
def test_groups_without_advantage_are_not_read(tmp_path, skip):
    _, watch, batches = watched(tmp_path, silent=3, skip_zero_advantage=skip)
    teaching = [packed_tokens(b, taught=True) for b in batches]
    assert 0 in teaching and any(0 < t < packed_tokens(b) for t, b in zip(teaching, batches, strict=True))
    read = sum(p.tokens for p in watch.scored)
    if not skip:
        assert read == sum(map(packed_tokens, batches))
        return
    # Where no group teaches one row stays, so that there is a gradient.
    rest = [b for b, t in zip(batches, teaching, strict=True) if not t]
    shortest = sum(min(map(len, b["prompts"])) + b["completion_ids"].shape[1] for b in rest)
    assert sum(teaching) < read <= sum(teaching) + shortest


@pytest.mark.slow
@needs_features
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 2, "beta": 0.05},
        OFF_POLICY,
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"prefetch_images": False},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_a_frozen_tower_sees_each_image_once(tmp_path, changes):
    """Each of the four in the first generation batch, and none again in the run."""
    trainer, watch, batches = watched(tmp_path, max_steps=4, **changes)
    assert len(batches) > 1
    assert sum(watch.tower) == 4 * sum(SHOWN)
    assert trainer.sight.seen == len(SHOWN)
    # The second batch is made ready before the first has been seen.
    ahead = len(SHOWN) * (trainer.args.prefetch_images and not trainer.args.dataloader_num_workers)
    assert len(SHOWN) <= watch.processed <= len(SHOWN) + ahead


def test_a_tower_that_is_trained_sees_with_every_update(tmp_path):
    trainer, watch, batches = watched(tmp_path, freeze=False, num_iterations=2, max_steps=4)
    assert len(batches) == 2
    assert sum(watch.tower) == 4 * sum(SHOWN) * 4
    assert watch.processed == len(SHOWN) * len(batches), "but what it reads is cut up once"
    assert trainer.sight.seen == 0


def test_a_frozen_tower_may_see_with_every_update(tmp_path):
    _, watch, _ = watched(tmp_path, see_once=False, num_iterations=2, max_steps=4)
    assert sum(watch.tower) == 4 * sum(SHOWN) * 4


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, OFF_POLICY, {"num_iterations": 2}], ids=str)
def test_a_prompt_is_tokenized_once_for_its_completions(tmp_path, monkeypatch, changes):
    calls = []
    stock = frugalpath.rl.rollout_trainer.read_prompt
    monkeypatch.setattr("frugalpath.rl.rollout_trainer.read_prompt", lambda *a, **o: calls.append(1) or stock(*a, **o))
    _, _, batches = watched(tmp_path, max_steps=4, **changes)
    assert len(calls) == 4 * len(batches)


def test_images_are_prepared_before_they_are_asked_for(tmp_path):
    trainer = make_trainer(Ours, str(tmp_path))
    rows = trainer.data_collator([trainer.train_dataset[i] for i in (0, 0, 2, 2)])
    views = [v for row in rows for v in row["views"]]
    assert len(views) == 6 and len(set(views)) == 3
    assert all(v.job is not None for v in views)
    off = make_trainer(Ours, str(tmp_path), prefetch_images=False)
    assert off.data_collator([1]) == [1]


def rollout(kind: type, folder: Any, **changes: Any) -> tuple[Any, list[list[int]]]:
    """Greedy completions of two rows of each prompt."""
    greedy = {"generation_kwargs": {"do_sample": False, **changes.pop("generation_kwargs", {})}}
    trainer = make_trainer(kind, str(folder), max_completion_length=12, **greedy, **changes)
    trainer.model.train()
    out = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (2, 1, 0, 3) for _ in range(4)])
    return trainer, [r[m.bool()].tolist() for r, m in zip(out["completion_ids"], out["completion_mask"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora": True}, {"text_only": True}, {"attention": "eager"}], ids=str)
def test_what_is_written_is_what_trl_writes(tmp_path, changes):
    _, stock = rollout(GRPOTrainer, tmp_path, **changes)
    assert len({tuple(row) for row in stock}) == 4, "what is written depends on the prompt"
    for once in (True, False):
        trainer, ours = rollout(GroupTrainer, tmp_path, prefill_once=once, **changes)
        assert ours == stock
        assert trainer.model.training


def test_generation_reads_each_prompt_once(tmp_path):
    trainer = make_trainer(GroupTrainer, str(tmp_path), max_steps=1)
    watch = Watch(trainer)
    trainer.train()
    prompts = sum(map(len, trainer._batch.prompts))
    written = [p.tokens for p in watch.passes if not p.scored]
    # Further passes read one token a completion.
    assert prompts <= sum(written) <= prompts + 16 * 7
    assert max(written[1:]) < prompts


def test_an_image_token_is_never_written(tmp_path):
    """The head is bent until the image token is what the model would write."""
    tokens = {}
    for free in (False, True):
        # A ban of the caller's own does not lift the one on images.
        trainer = make_trainer(
            GroupTrainer, str(tmp_path), generation_kwargs={"do_sample": False, "suppress_tokens": None}
        )
        if free:
            trainer.generation_config.suppress_tokens = None
        trainer.model.train()
        image = trainer.sight.image_token_id
        head = trainer.model.lm_head.weight
        with torch.no_grad():
            head[image] = 20 * head[200]
            trainer._tokenize_prompts([[{"role": "user", "content": "Tumour?"}]])
            last = trainer.model(
                input_ids=trainer._batch.prompts[0].ids[None], output_hidden_states=True
            ).hidden_states[-1]
            head[image] = 20 * last[0, -1]
        tokens[free] = {t for row in trainer._generate_single_turn([], None, {}, 1)[0] for t in row}
    assert image in tokens[True] and image not in tokens[False]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"beta": 0.05, **OFF_POLICY}], ids=str)
def test_evaluation_scores_without_a_loss(tmp_path, changes):
    options = {"evaluate": True, "per_device_eval_batch_size": 8, **changes}
    trainers = [make_trainer(Ours, str(tmp_path), skip_eval_loss=skip, **options) for skip in (True, False)]
    watches = [Watch(t) for t in trainers]
    quick, whole = (t.evaluate() for t in trainers)
    stock = make_trainer(Stock, str(tmp_path), **options).evaluate()
    assert not watches[0].scored and watches[1].scored
    assert "eval_loss" not in quick and quick["eval_reward"] == stock["eval_reward"]
    for key in ("eval_loss", "eval_reward", "eval_reward_std", "eval_entropy", *(["eval_kl"] if changes else [])):
        assert whole[key] == pytest.approx(stock[key], rel=1e-4, abs=1e-6), key
    assert set(whole) == set(stock)


def test_rewards_are_given_the_images_of_the_training_set(tmp_path):
    told = {}
    for kind in (Stock, Ours):

        def reward(completions: list, prompts: list, images: list, kind: type = kind, **columns: Any) -> list[float]:
            assert all(isinstance(i, Image.Image) for row in images for i in row)
            told[kind] = [[i.size for i in row] for row in images], sorted(columns), [len(p) for p in prompts]
            return [float(len(c[0]["content"])) for c in completions]

        make_trainer(kind, str(tmp_path), reward=reward, max_steps=1).train()
    assert told[Ours] == told[Stock]
    assert sum(len(row) for row in told[Ours][0]) == 16


def test_completions_are_logged(tmp_path):
    for kind in (Stock, Ours):
        folder = tmp_path / kind.__name__
        make_trainer(kind, str(folder), log_completions=True, num_completions_to_print=1, max_steps=1).train()
    stock, ours = (pd.read_parquet(tmp_path / k / "completions/completions_00001.parquet") for k in ("Stock", "Ours"))
    assert len(ours) == 16
    order = ["completion", "even_tokens"]
    ours, stock = (t.astype({"prompt": str, "completion": str}) for t in (ours, stock))
    ours, stock = (t.sort_values(order, ignore_index=True) for t in (ours, stock))
    pd.testing.assert_frame_equal(ours, stock)
    assert ours["prompt"].str.contains("Which grade").sum() == 4


@needs_features
def test_a_single_image_column_is_shown(tmp_path):
    rows = [{"prompt": r["prompt"], "image": noise(84, 56, i)} for i, r in enumerate(make_rows("text"))]
    logs = []
    for kind in (Stock, Ours):
        trainer = make_trainer(kind, str(tmp_path), dataset=Dataset.from_list(rows), max_steps=2)
        trainer.train()
        logs.append([(row["loss"], row["grad_norm"]) for row in steps(trainer)])
    assert trainer.sight.seen == 4
    for ours, stock in zip(logs[1], logs[0], strict=True):
        assert ours == pytest.approx(stock, rel=1e-5, abs=1e-6)


def grade(case: str) -> str:
    """Look up a grade.

    Args:
        case: its name.
    """
    return case


@pytest.mark.parametrize(
    "more", [{"tools": [grade]}, {"rollout_func": lambda prompts, trainer: {}}], ids=["tools", "rollout"]
)
def test_prompts_that_others_make_are_refused(tmp_path, monkeypatch, more):
    # The small tokenizer's template knows no tools, at which TRL would stop before us.
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda processor: True)
    monkeypatch.setattr("trl.trainer.grpo_trainer.add_response_schema", lambda processor: processor)
    with pytest.raises(ValueError, match=r"tools.*rollout_func.*use TRL's GRPOTrainer"):
        make_trainer(GroupTrainer, str(tmp_path), more=more)


@pytest.mark.parametrize(
    ("rows", "text_only", "message"),
    [
        (
            [{"prompt": [{"role": "user", "content": "A <|image_pad|>?"}]}] * 4,
            False,
            r"'<\|image_pad\|>'.*remove it",
        ),
        ([{"prompt": "A <|image_pad|>?"}] * 4, False, r"1 places for images and 0 images.*remove it"),
        ([{"prompt": "Tumour?", "images": [noise(56, 56, 0)]}] * 4, False, "are texts, such as 'Tumour.'; give conv"),
        (None, True, "reads text only; use a vision-language model"),
    ],
    ids=["token", "token in a text", "texts with images", "images for a text model"],
)
def test_rows_that_cannot_be_shown_are_refused(tmp_path, rows, text_only, message):
    dataset = Dataset.from_list(rows) if rows else make_rows()
    with pytest.raises(InputError, match=message):
        make_trainer(GroupTrainer, str(tmp_path), dataset=dataset, text_only=text_only).train()


def test_a_vision_language_model_of_another_family_is_refused(tmp_path):
    trainer = make_trainer(GRPOTrainer, str(tmp_path))
    trainer.model.config.model_type = "other_vl"
    with pytest.raises(
        InputError, match=r"the family other_vl is unknown here; use one of .*qwen_vl, gemma_vl and text models"
    ):
        frugalpath.rl.rollout_trainer.make_vision_adapter(trainer.model, trainer.processing_class.tokenizer)
    assert backbone(trainer.model).visual is not None
