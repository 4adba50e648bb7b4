"""What is published as an adapter is, over its base, what was evaluated; what the Hub refuses is told."""

from __future__ import annotations

from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel, get_peft_model

from frugalpath.deploy.publish import push
from frugalpath.deploy.publishing import _write_performer
from frugalpath.deploy.run import MARK
from frugalpath.errors import InputError
from frugalpath.models.adapters import ADAPTER
from frugalpath.models.build import PerformerConfig, load_performer, lora_config


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen_vl", "gemma_vl"])
def test_a_family_that_sees_images_is_read_over_its_base(make_performer, tmp_path, family):
    performer = make_performer(family=family)
    performer.save(tmp_path / "base")
    config = PerformerConfig(family=family, lora={"r": 2}, show_options=False)
    torch.manual_seed(1)
    tuned = get_peft_model(performer.model, lora_config(config, performer.model))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    adapter = tmp_path / "run" / "grpo" / ADAPTER
    tuned.save_pretrained(adapter)
    performer.model = tuned.merge_and_unload()
    performer.save(tmp_path / "run" / "grpo")
    run = SimpleNamespace(folder=tmp_path / "run", performer=config)
    _write_performer(run, tmp_path / "published", [adapter], str(tmp_path / "base"))
    assert not list((tmp_path / "published").glob("model*.safetensors"))
    published = load_performer(tmp_path / "published", config, performer.bank).model
    assert type(published) is type(performer.model) and not isinstance(published, PeftModel)
    expected = performer.model.state_dict()
    for name, weight in published.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    performer.model.get_output_embeddings().weight.data.add_(1)
    performer.save(tmp_path / "run" / "grpo")
    with pytest.raises(InputError, match="--merge"):
        _write_performer(run, tmp_path / "other", [adapter], str(tmp_path / "base"))


@pytest.mark.parametrize(("repo", "said"), [("a/b/c", "namespace/repo_name"), ("someone/model", "refused")])
def test_what_the_hub_refuses_is_told(tmp_path, monkeypatch, repo, said):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    (tmp_path / MARK).write_text('{"files": []}')
    with pytest.raises(InputError, match=f"--push {repo}: .*{said}"):
        push(tmp_path, repo, "hf_none", public=False)
