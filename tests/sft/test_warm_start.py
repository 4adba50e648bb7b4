from __future__ import annotations

import pytest
import torch

from rewards.registry import gold_completion
from sft.warm_start import BudgetCollator, sft_config, train_sft
from tests.conftest import LADDER


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
