"""Adapters trained one after another, each merged before the next, are the same as their join."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from frugalpath.errors import InputError
from frugalpath.models.adapters import (
    ADAPTER,
    CONFIG,
    WEIGHTS,
    adapter_of,
    config_source,
    join_adapters,
    merge_adapter,
)
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.qwen_vl import load_qwen


def trained(model, folder, **lora):
    """The model with a drawn adapter merged into it, and all that is trained whole moved; it is kept."""
    family = "qwen_vl" if model.config.model_type == "qwen2_5_vl" else "slide_vlm"
    made = get_peft_model(model, lora_config(PerformerConfig(family=family, lora=lora), model))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    made.save_pretrained(folder / ADAPTER)
    return made.merge_and_unload()


@pytest.mark.parametrize("family", ["qwen_vl", "slide_vlm"])
def test_joined_adapters_give_the_weights_that_were_trained(make_performer, tmp_path, family):
    base = make_performer(family=family).model
    torch.manual_seed(1)
    first = trained(copy.deepcopy(base), tmp_path / "sft", r=2, lora_alpha=8)
    second = trained(first, tmp_path / "grpo", r=3, use_rslora=True)
    join_adapters([tmp_path / "sft" / ADAPTER, tmp_path / "grpo" / ADAPTER], "someone/base", tmp_path / "joined")
    found = merge_adapter(base, tmp_path / "joined").state_dict()
    for name, weight in second.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert '"base_model_name_or_path": "someone/base"' in (tmp_path / "joined" / CONFIG).read_text()


def test_a_folder_of_an_adapter_is_read_over_its_base(make_qwen, tmp_path):
    base = make_qwen().model
    base.save_pretrained(tmp_path / "base")
    second = trained(base, tmp_path / "run", r=2)
    join_adapters([tmp_path / "run" / ADAPTER], str(tmp_path / "base"), tmp_path / "model")
    assert config_source(tmp_path / "model") == str(tmp_path / "base")
    ours, stock = load_qwen(tmp_path / "model"), type(second).from_pretrained(tmp_path / "model")
    assert not isinstance(ours, PeftModel) and not any("lora" in name for name in ours.state_dict())
    ids = torch.arange(10, 20)[None]
    expected = second(input_ids=ids).logits
    assert (expected - load_qwen(tmp_path / "base")(input_ids=ids).logits).abs().max() > 1e-2
    for read in (ours, stock):
        torch.testing.assert_close(read(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_weights_come_before_an_adapter(tmp_path):
    (tmp_path / ADAPTER).mkdir()
    (tmp_path / ADAPTER / CONFIG).touch()
    assert adapter_of(tmp_path) == tmp_path / ADAPTER
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert adapter_of(tmp_path) is None


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "lora_only"}, {"target_modules": ["q_proj"]}])
def test_other_adapters_are_refused(make_performer, tmp_path, change):
    first = trained(make_performer().model, tmp_path / "a", r=2)
    trained(first, tmp_path / "b", r=2, **change)
    with pytest.raises(InputError, match="--merge"):
        join_adapters([tmp_path / "a" / ADAPTER, tmp_path / "b" / ADAPTER], "base", tmp_path / "joined")
    assert not (tmp_path / "joined" / WEIGHTS).exists()
