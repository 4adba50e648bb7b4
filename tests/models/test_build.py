from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, build_performer, load_performer, lora_config, make_vision_adapter
from frugalpath.models.performer import QwenPerformer, SlidePerformer
from frugalpath.models.qwen_vl import VISION_MARKS, QwenVisionAdapter
from frugalpath.models.tokenizer import IMAGE_TOKEN, train_tokenizer
from frugalpath.models.vision_adapter import SlideVisionAdapter, TextVisionAdapter
from frugalpath.models.vision_tower import is_frozen
from tests.conftest import noise

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 48, "vocab_size": 300}


@pytest.mark.parametrize("family", ["qwen", "slide", ""])
def test_an_unknown_family_is_refused(family):
    with pytest.raises(InputError, match=f"performer.family: '{family}' is unknown; use one of slide_vlm, qwen_vl"):
        PerformerConfig(family=family)


# Qwen2.5-VL.


def test_a_small_qwen_has_the_shape_of_its_recipe(cases, bank):
    config = PerformerConfig(
        family="qwen_vl", layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocab_size=400, system="Look."
    )
    made = build_performer(config, cases, bank)
    assert isinstance(made, QwenPerformer)
    text, vision = made.model.config.get_text_config(), made.model.config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (3, 64, 4)
    assert (text.num_key_value_heads, text.intermediate_size) == (2, 96)
    assert (vision.depth, vision.hidden_size, vision.num_heads, vision.intermediate_size) == (3, 64, 4, 96)
    assert vision.out_hidden_size == 64 and vision.fullatt_block_indexes == [2], "other layers look within windows"
    tokenizer = made.processor.tokenizer
    assert text.vocab_size == len(tokenizer) <= 400
    assert made.model.config.image_token_id == tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert made.model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Multimodal RoPE divides the frequencies of a head among time, height and width.
    assert sum(text.rope_parameters["mrope_section"]) == 64 // 4 // 2
    assert made.system == "Look." and made.show_options
    assert tokenizer.decode(tokenizer("".join(VISION_MARKS))["input_ids"], skip_special_tokens=True) == ""


def test_its_tokenizer_knows_the_words_of_the_cases(image_cases, bank):
    made = build_performer(PerformerConfig(family="qwen_vl", **{**SMALL, "vocab_size": 1024}), image_cases, bank)
    lengths = [len(made.processor.tokenizer(word)["input_ids"]) for word in ("tumour", "normal", "xylophone")]
    assert lengths[0] <= 2 and lengths[1] <= 2 < lengths[2]


def test_the_seed_makes_the_weights(image_cases, bank):
    config = PerformerConfig(family="qwen_vl", **SMALL)
    first, same, other = (build_performer(config, image_cases, bank, seed) for seed in (1, 1, 2))
    for a, b, c in zip(*(m.model.state_dict().values() for m in (first, same, other)), strict=True):
        assert torch.equal(a, b)
        assert a.std() == 0 or a.ndim == 1 or not torch.equal(a, c)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_tower_is_frozen_on_demand(image_cases, bank, tmp_path, frozen):
    config = PerformerConfig(family="qwen_vl", freeze_vision=frozen, **SMALL)
    made = build_performer(config, image_cases, bank)
    made.save(tmp_path)
    again = build_performer(
        PerformerConfig(family="qwen_vl", freeze_vision=frozen, pretrained=str(tmp_path)), image_cases, bank
    )
    third = build_performer(PerformerConfig(freeze_vision=frozen, checkpoint=str(tmp_path)), image_cases, bank)
    for each in (made, again, third):
        base = each.model.model
        assert is_frozen(base.visual) == frozen
        assert all(p.requires_grad == (not frozen) for p in base.visual.parameters())
        assert all(p.requires_grad for p in (*base.language_model.parameters(), each.model.lm_head.weight))


@pytest.mark.parametrize("key", ["pretrained", "checkpoint"])
def test_a_folder_gives_the_weights_and_the_recipe_the_rest(qwen, image_cases, bank, tmp_path, key):
    qwen.save(tmp_path)
    config = PerformerConfig(family="qwen_vl", system="Answer.", show_options=False, layers=9, **{key: str(tmp_path)})
    again = build_performer(config, image_cases, bank)
    assert isinstance(again, QwenPerformer)
    saved = qwen.model.state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in again.model.state_dict().items())
    assert (again.system, again.show_options) == ("Answer.", False)
    assert again.bank is bank


def test_a_folder_tells_its_family(qwen, performer, bank, tmp_path):
    qwen.save(tmp_path / "qwen")
    performer.save(tmp_path / "slide")
    config = PerformerConfig(show_options=False, system="S")
    loaded = [load_performer(tmp_path / name, config, bank) for name in ("qwen", "slide")]
    assert [type(p) for p in loaded] == [QwenPerformer, SlidePerformer]
    assert all(p.system == "S" and not p.show_options for p in loaded)


# How a model sees.


def test_a_sight_follows_the_processor_or_the_model(qwen, performer):
    for made in (qwen, performer):
        assert make_vision_adapter(made.model, made.processor) is made.processor.sight
    assert isinstance(performer.processor.sight, SlideVisionAdapter)
    # A stock processor holds its parts under the same names.
    stock = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil(), tokenizer=qwen.processor.tokenizer)
    sight = make_vision_adapter(qwen.model, stock)
    assert isinstance(sight, QwenVisionAdapter) and sight.image_token_id == qwen.processor.image_token_id
    assert len(sight.view(noise(112, 84, 0))) == 12


def test_a_text_model_has_nothing_to_see():
    config = AutoConfig.for_model(
        "qwen2", vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(make_vision_adapter(model, train_tokenizer(["a"], 280)), TextVisionAdapter)


def test_another_vision_language_model_is_refused():
    model = SimpleNamespace(config=SimpleNamespace(model_type="llava", vision_config={}))
    with pytest.raises(InputError, match="the family llava is unknown here; use one of slide_vlm, qwen_vl"):
        make_vision_adapter(model, SimpleNamespace())


# Adapters.


def test_no_lora_no_adapters():
    assert lora_config(PerformerConfig(family="qwen_vl", lora=None), None) is None


@pytest.mark.parametrize("family", ["qwen", "performer"])
def test_adapters_are_on_the_language_projections_alone(request, family):
    model = request.getfixturevalue(family).model
    layers = model.config.get_text_config().num_hidden_layers
    adapted = get_peft_model(model, lora_config(PerformerConfig(family="qwen_vl", lora={}), None))
    hit = {name.split(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A.default")}
    assert len(hit) == layers * len(PROJECTIONS)
    assert all(".language_model.layers." in name and name.endswith(PROJECTIONS) for name in hit)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_keys_of_lora_have_the_say():
    config = lora_config(
        PerformerConfig(family="qwen_vl", lora={"r": 3, "lora_dropout": 0.5, "target_modules": ["q_proj"]}), None
    )
    assert config is not None
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 32, 0.5)
    assert config.target_modules == {"q_proj"} and config.task_type == "CAUSAL_LM"
    default = lora_config(PerformerConfig(family="qwen_vl", lora={}), None)
    assert default is not None and (default.r, default.lora_alpha, default.lora_dropout) == (16, 32, 0.0)


def test_an_unknown_key_of_lora_is_named():
    with pytest.raises(InputError, match=r"performer\.lora: .*'rank'.*peft's LoraConfig"):
        lora_config(PerformerConfig(family="qwen_vl", lora={"rank": 8}), None)


# Stored features.


def test_the_default_family_reads_stored_features(make_performer, cases):
    made = make_performer(aligner_width=24)
    assert isinstance(made, SlidePerformer)
    assert made.model.config.aligner_width == 24
    assert made.model.config.feature_dim == made.bank.dim
    marks = made.processor.tokenizer.convert_tokens_to_ids(list(VISION_MARKS))
    assert set(marks) == {None}, "marks around images are Qwen's alone"
