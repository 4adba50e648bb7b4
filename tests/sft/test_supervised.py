from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import SFTTrainer

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.performer import QwenPerformer
from frugalpath.models.processor import token_types
from frugalpath.rewards.registry import gold_completion
from frugalpath.sft.supervised import BudgetCollator, StageTrainer, part_of, sft_config, stage_rates, train_sft
from tests.conftest import LADDER, needs_features


@pytest.fixture
def collator(performer, cases) -> BudgetCollator:
    return BudgetCollator(performer, cases, LADDER, text_only=0.1, seed=0)


def shown(performer, batch) -> int:
    """Visual tokens of the first row of a batch."""
    return int((batch["input_ids"][0] == performer.processor.image_token_id).sum())


@pytest.mark.parametrize("budget", [0, 4, 16])
def test_labels_are_on_the_completion_only(performer, collator, cases, budget):
    batch = collator.batch(cases[:5], budget)
    tokenizer = performer.processor.tokenizer
    for row, labels, mask, case in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], cases[:5], strict=True
    ):
        here = labels != -100
        assert torch.equal(labels[here], row[here])
        assert tokenizer.decode(labels[here]) == gold_completion({"answer": case.answer}) + tokenizer.eos_token
        first = int(here.nonzero()[0])
        assert tokenizer.decode(row[:first]).endswith("<|im_start|>assistant\n")
        assert (row == performer.processor.image_token_id).sum() == budget
        assert (mask.diff() <= 0).all(), "padding is on the right"
        assert not here[mask == 0].any()
    assert ("pixel_values" in batch) == (budget > 0)


def test_the_same_rows_see_the_same_budget(performer, cases, collator):
    again = BudgetCollator(performer, cases, LADDER, text_only=0.1, seed=0)
    for start in range(6):
        rows = [{"index": start}, {"index": start + 1}]
        first, second = collator(rows), again(rows)
        assert torch.equal(first["input_ids"], second["input_ids"])


def test_budgets_are_uniform_on_the_ladder_with_a_share_of_text_alone(performer, cases):
    drawn = []
    for seed in range(60):
        each = BudgetCollator(performer, cases, LADDER, text_only=0.25, seed=seed)
        drawn += [shown(performer, each([{"index": i}])) for i in range(4)]
    shares = [drawn.count(b) / len(drawn) for b in (0, *LADDER)]
    # 240 draws of 1/4 each: the standard error is 0.028.
    assert shares == pytest.approx([0.25] * 4, abs=0.1)


def test_without_a_share_of_text_every_row_sees(performer, cases):
    for seed in range(20):
        each = BudgetCollator(performer, cases, [4], text_only=0.0, seed=seed)
        assert shown(performer, each([{"index": 0}])) == 4


def test_training_lowers_the_loss_and_teaches_the_form(make_performer, cases, tmp_path):
    performer = make_performer(aligner_dropout=0.0)
    options = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 5,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = train_sft(performer, cases, LADDER, sft_config(tmp_path, options, seed=0), text_only=0.0)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.2 * losses[0]
    answers = performer.answer(cases, [16] * len(cases), max_new_tokens=16)
    known = {gold_completion({"answer": "normal"}), gold_completion({"answer": "tumour"})}
    assert all(a.text in known for a in answers)
    right = sum(a.text == gold_completion({"answer": c.answer}) for a, c in zip(answers, cases, strict=True))
    assert right >= 6, "what the images show is used"


def test_the_recipe_has_the_say_except_in_what_is_fixed(tmp_path):
    config = sft_config(tmp_path / "x", {"learning_rate": 1.0, "output_dir": "elsewhere", "use_cpu": True}, seed=5)
    assert config.learning_rate == 1.0 and config.weight_decay == 0.01
    assert config.output_dir == str(tmp_path / "x") and config.seed == 5
    assert config.remove_unused_columns is False


# Qwen2.5-VL.

OPTIONS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 3e-3,
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def qwen_batch(performer, cases, budget) -> dict:
    return BudgetCollator(performer, cases, LADDER, text_only=0.0, seed=0).batch(cases, budget)


def gold_ids(performer, case) -> list[int]:
    tokenizer = performer.processor.tokenizer
    return tokenizer(gold_completion({"answer": case.answer}) + tokenizer.eos_token)["input_ids"]


def stock_batch(performer, cases, budget) -> dict[str, torch.Tensor]:
    """The same rows as stock inputs: pixels, grids and types of tokens; positions are the model's own."""
    views = [performer.see(c, budget) for c in cases]
    processor = performer.processor
    texts = processor.apply_chat_template(
        [performer.messages(c, v) for c, v in zip(cases, views, strict=True)], add_generation_prompt=True
    )
    eos = processor.tokenizer.eos_token
    texts = [t + gold_completion({"answer": c.answer}) + eos for t, c in zip(texts, cases, strict=True)]
    out = processor(
        images=views if any(views) else None, text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    labels = torch.full_like(out["input_ids"], -100)
    for row, mask, case in zip(labels, out["attention_mask"], cases, strict=True):
        gold = gold_ids(performer, case)
        row[int(mask.sum()) - len(gold) : int(mask.sum())] = torch.tensor(gold)
    return {**out, "labels": labels}


@pytest.mark.parametrize("budget", [0, 1, 12])
def test_labels_of_image_prompts_are_on_the_answer_only(qwen, image_cases, budget):
    batch = qwen_batch(qwen, image_cases, budget)
    tokenizer, image = qwen.processor.tokenizer, qwen.processor.image_token_id
    for row, labels, case in zip(batch["input_ids"], batch["labels"], image_cases, strict=True):
        here = (labels != -100).nonzero()[:, 0]
        assert labels[here].tolist() == row[here].tolist() == gold_ids(qwen, case)
        assert here.tolist() == list(range(int(here[0]), int(here[-1]) + 1))
        assert tokenizer.decode(row[: here[0]]).endswith("<|im_start|>assistant\n")
        assert int((row == image).sum()) == sum(map(len, qwen.see(case, budget)))
    assert (batch["input_ids"] == image).any() == (budget > 0)


@pytest.mark.parametrize("budget", [0, 4, 16])
def test_positions_of_a_batch_are_those_of_the_stock_model(qwen, image_cases, budget):
    batch, stock = qwen_batch(qwen, image_cases, budget), stock_batch(qwen, image_cases, budget)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[key], stock[key])
    typed = token_types(batch["input_ids"], qwen.processor.image_token_id)
    assert torch.equal(typed, stock["mm_token_type_ids"])
    expected, _ = qwen.model.model.get_rope_index(
        batch["input_ids"], typed, stock.get("image_grid_thw"), attention_mask=batch["attention_mask"]
    )
    assert batch["position_ids"].shape == (3, *batch["input_ids"].shape)
    assert torch.equal(batch["position_ids"], expected)
    assert (batch["attention_mask"] == 0).any(), "some rows are padded"


@needs_features
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_gives_features_and_another_pixels(make_qwen, image_cases, frozen):
    performer = make_qwen(freeze_vision=frozen)
    count = sum(len(performer.see(c, 12)) for c in image_cases)
    for _ in range(2):
        batch = qwen_batch(performer, image_cases, 12)
        assert ("pixel_values" in batch) == ("image_grid_thw" in batch) == (not frozen)
        assert ("mm_encoder_outputs" in batch) == frozen
        assert performer.processor.sight.seen == (count if frozen else 0)
    blank = qwen_batch(performer, image_cases, 0)
    assert set(blank) == {"input_ids", "attention_mask", "position_ids", "labels"}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("budget", [0, 4, 16])
def test_the_loss_is_that_of_the_stock_model(make_qwen, image_cases, frozen, budget):
    performer = make_qwen(freeze_vision=frozen)
    model = performer.model.train()
    out = model(**qwen_batch(performer, image_cases, budget))
    stock = model(**stock_batch(performer, image_cases, budget))
    assert out.loss.item() == pytest.approx(stock.loss.item(), rel=1e-5)
    head = model.lm_head.weight
    ours, theirs = (torch.autograd.grad(x.loss, head)[0] for x in (out, stock))
    assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-3)
    blank = model(**qwen_batch(performer, image_cases, 0))
    assert (out.loss.item() != blank.loss.item()) == (budget > 0), "images are heard"


def tune(performer: QwenPerformer, cases, folder: Path, steps: int = 12, **options) -> list[float]:
    """Losses of a short warm start."""
    config = sft_config(folder, {**OPTIONS, "max_steps": steps}, seed=0)
    trainer = train_sft(performer, cases, LADDER, config, text_only=0.0, **options)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def changed(before: dict[str, torch.Tensor], performer) -> set[str]:
    after = performer.model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def weights(performer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in performer.model.state_dict().items()}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_warm_start_of_all_weights(make_qwen, image_cases, tmp_path, frozen):
    performer = make_qwen(freeze_vision=frozen)
    before = weights(performer)
    losses = tune(performer, image_cases, tmp_path / "run")
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    names = changed(before, performer)
    visual = {name for name in names if ".visual." in name}
    if frozen:
        assert not visual
        assert performer.processor.sight.seen <= 3 * sum(len(c.images) for c in image_cases)
    else:
        matrices = {n for n, v in before.items() if ".visual." in n and v.ndim > 1}
        assert matrices <= visual
        assert performer.processor.sight.seen == 0
    assert {n for n, v in before.items() if ".visual." not in n and v.ndim > 1} <= names


@pytest.mark.parametrize("frozen", [True, False])
def test_a_warm_start_through_adapters(make_qwen, image_cases, tmp_path, frozen):
    performer = make_qwen(freeze_vision=frozen)
    before = weights(performer)
    lora = lora_config(PerformerConfig(family="qwen_vl", lora={"r": 8, "lora_alpha": 32}), performer.model)
    losses = tune(performer, image_cases, tmp_path / "run", steps=25, lora=lora)
    assert losses[-1] < 0.8 * losses[0]
    model = performer.model
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_modules())
    names = changed(before, performer)
    projections = {n for n in before if ".language_model.layers." in n and n.endswith("_proj.weight")}
    assert names == projections and len(names) == 14, "merged into each projection, nothing else moved"
    # What was trained is what is saved.
    performer.save(tmp_path / "saved")
    model.eval()
    answers = performer.answer(image_cases, [16] * 6, max_new_tokens=6)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert all(torch.equal(v, stock.state_dict()[n]) for n, v in model.state_dict().items())
    inputs = stock_batch(performer, image_cases, 16)
    with torch.no_grad():
        assert stock(**inputs).loss.item() < 0.8 * losses[0]
        assert stock(**inputs).loss.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-6)
    again = QwenPerformer.load(tmp_path / "saved", performer.bank, show_options=False)
    again.model.eval()
    assert [a.text for a in again.answer(image_cases, [16] * 6, max_new_tokens=6)] == [a.text for a in answers]


def test_adapters_serve_the_other_family_as_well(make_performer, cases, tmp_path):
    performer = make_performer(aligner_dropout=0.0)
    before = weights(performer)
    losses = tune(
        performer,
        cases,
        tmp_path,
        steps=20,
        lora=lora_config(PerformerConfig(family="qwen_vl", lora={"r": 8}), performer.model),
    )
    assert losses[-1] < losses[0]
    assert not any("lora" in name for name in performer.model.state_dict())
    names = changed(before, performer)
    assert len(names) == 7 and all(".language_model.layers." in n for n in names)


def test_what_the_images_show_is_learnt(make_qwen, image_cases, tmp_path):
    """Two cases differ in their images alone."""
    first, second = image_cases[0], image_cases[3]
    alike = [
        dataclasses.replace(first, answer="normal"),
        dataclasses.replace(first, id="other", images=second.images[:1], answer="tumour"),
    ]
    performer = make_qwen()
    config = sft_config(tmp_path, {**OPTIONS, "max_steps": 60, "per_device_train_batch_size": 2}, seed=0)
    train_sft(performer, alike, [9], config, text_only=0.0)
    texts = [a.text for a in performer.answer(alike, [9, 9], max_new_tokens=16)]
    assert texts == [gold_completion({"answer": c.answer}) for c in alike]


# A learning rate for each part.


class StopAt(TrainerCallback):
    """Ends a training early, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **rest):
        control.should_training_stop = state.global_step == self.step


def test_alignment_trains_what_stands_before_the_language_model(make_performer, cases, tmp_path):
    performer = make_performer(markers="unique", fusion="cross_attention", cross_layers=[0], aligner_dropout=0.0)
    before = weights(performer)
    args = sft_config(tmp_path, {**OPTIONS, "max_steps": 6}, seed=0)
    trainer = train_sft(performer, cases, LADDER, args, 0.0, rates=stage_rates("align", {"seeing": 1e-2}))
    names = changed(before, performer)
    assert names and all(part_of(name) == "seeing" for name in names)
    assert {name.split(".")[1] for name in names} == {"aligner", "markers", "routes"}
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


def test_case_training_has_three_learning_rates(make_performer, cases, tmp_path):
    performer = make_performer(aligner_dropout=0.0)
    before = weights(performer)
    rates = stage_rates("case", {"lora": 3e-3, "seeing": 1e-2, "language": 1e-3})
    adapters = lora_config(PerformerConfig(lora={"r": 2}), performer.model)
    args = sft_config(tmp_path, {**OPTIONS, "max_steps": 4, "lr_scheduler_type": "constant"}, seed=0)
    trainer = train_sft(performer, cases, LADDER, args, 0.0, lora=adapters, rates=rates)
    groups = {group["lr"]: group["params"] for group in trainer.optimizer.param_groups}
    assert set(groups) == {1e-2, 3e-3, 1e-3}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held), "each weight is in one group"
    names = changed(before, performer)
    assert {part_of(name) for name in names} == {"seeing", "language"}
    assert "lm_head.weight" in names and any("q_proj" in name for name in names)
    assert not any("lora" in name for name in performer.model.state_dict())


def test_a_stopped_stage_has_the_weights_trained_beside_its_adapters(make_performer, cases, tmp_path):
    rates = {"lora": 3e-3, "seeing": 1e-2, "language": 1e-2}
    made = {}
    for name in ("whole", "stopped", "resumed"):
        performer = make_performer(aligner_dropout=0.0)
        adapters = lora_config(PerformerConfig(lora={"r": 2}), performer.model)
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        stop = {"callbacks": [StopAt(2)]} if name == "stopped" else {}
        resume = str(tmp_path / "stopped" / "checkpoint-2") if name == "resumed" else None
        args = sft_config(tmp_path / name, {**OPTIONS, **options}, seed=0)
        train_sft(performer, cases, LADDER, args, 0.0, lora=adapters, rates=rates, resume=resume, **stop)
        made[name] = weights(performer)
    for name, weight in made["whole"].items():
        torch.testing.assert_close(made["resumed"][name], weight, msg=name)
    assert not torch.equal(made["stopped"]["lm_head.weight"], made["whole"]["lm_head.weight"])


def test_published_rates_are_the_defaults():
    assert stage_rates("align", None) == {"seeing": 1e-4}
    assert stage_rates("case", {"language": 0}) == {"seeing": 1e-4, "lora": 2e-5}
    assert stage_rates("warm_start", None) is None
    with pytest.raises(InputError, match=r"no part vision; it has seeing, lora, language"):
        stage_rates("case", {"vision": 1e-3})
    with pytest.raises(InputError, match=r"seeing: '1e-3', lora: -1: write numbers of at least 0"):
        stage_rates("case", {"seeing": "1e-3", "lora": -1})
    with pytest.raises(InputError, match=r"0\.1 is not a mapping"):
        stage_rates("case", 0.1)
    with pytest.raises(InputError, match="every learning rate is 0"):
        stage_rates("align", {"seeing": 0})


def test_the_overridden_method_is_that_of_the_trainer():
    stock = inspect.signature(SFTTrainer.create_optimizer).parameters
    assert list(stock) == list(inspect.signature(StageTrainer.create_optimizer).parameters)


def test_an_unknown_key_of_a_stage_is_named(tmp_path):
    with pytest.raises(InputError, match=r"sft: .*'max_stepz'.*SFTConfig"):
        sft_config(tmp_path, {"max_stepz": 3}, 0)
