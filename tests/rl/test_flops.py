"""Supervised stages and GRPO count the FLOPs of training alike."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import get_peft_model

from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.sft.supervised import BudgetCollator, StageTrainer, sft_config, train_sft
from tests.conftest import LADDER


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("family", ["slide_vlm", "qwen_vl"])
def test_the_same_tokens_cost_the_same(make_performer, make_trainer, cases, image_cases, tmp_path, family, lora):
    shape = {"family": family, **({"layers": 2, "ffn": 48} if family == "qwen_vl" else {})}
    shown = image_cases if family == "qwen_vl" else cases
    adapters = lora_config(PerformerConfig(family=family, lora=lora), make_performer(**shape).model)
    grpo = make_trainer(make_performer(**shape), peft_config=adapters, shown=shown)
    performer = make_performer(**shape)
    collator = BudgetCollator(performer, shown, LADDER, 0.0, seed=0)
    stage = StageTrainer(
        model=performer.model if lora is None else get_peft_model(performer.model, adapters),
        args=sft_config(tmp_path / "sft", {"use_cpu": True, "bf16": False, "report_to": "none"}, seed=0),
        data_collator=collator,
        train_dataset=Dataset.from_dict({"index": list(range(len(shown)))}),
        processing_class=performer.processor,
    )
    batch = collator.batch(shown, 9)
    tokens = int(batch["attention_mask"].sum())
    assert tokens < batch["input_ids"].numel(), "some is padding"
    grpo.model.train()
    grpo._count(tokens)
    assert stage.floating_point_ops(batch) == grpo.floating_point_ops({}) > 0


def test_a_stage_records_what_its_tokens_cost(make_performer, cases, tmp_path):
    """With adapters 4 a parameter and token, and a little for the adapters themselves."""
    performer = make_performer()
    adapters = lora_config(PerformerConfig(lora={"r": 2}), performer.model)
    options = {"max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False, "report_to": "none"}
    args = sft_config(tmp_path, options, seed=0)
    counted = sum(p.numel() for n, p in performer.model.named_parameters() if "embed_tokens" not in n)
    tokens = int(BudgetCollator(performer, cases, [4], 0.0, 0).batch(cases, 4)["attention_mask"].sum())
    trainer = train_sft(performer, cases, [4], args, text_only=0.0, lora=adapters)
    assert 4 < trainer.state.total_flos / (2 * tokens * counted) < 5
