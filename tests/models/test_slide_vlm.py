from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2ForCausalLM

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, build_performer
from frugalpath.models.performer import SlidePerformer
from frugalpath.models.slide_config import SlideVLMConfig
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.models.tokenizer import IMAGE_TOKEN, train_tokenizer
from tests.conftest import WIDTH, grid_features


def batch(performer, cases, budgets) -> dict[str, torch.Tensor]:
    """Left-padded prompts of the cases, each at its budget."""
    messages = [performer.messages(c, performer.see(c, b)) for c, b in zip(cases, budgets, strict=True)]
    images = [performer.see(c, b) for c, b in zip(cases, budgets, strict=True)]
    text = performer.processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(performer.processor(images=images, text=text, padding=True, return_tensors="pt"))


@pytest.fixture
def inputs(performer, cases) -> dict[str, torch.Tensor]:
    return batch(performer, cases[:3], (4, 0, 16))


def qwen(tie: bool, vocab_size: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


@torch.no_grad()
def test_a_saved_model_gives_equal_logits(performer, bank, inputs, tmp_path):
    performer.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    again = SlidePerformer.load(tmp_path, bank, show_options=False)
    again.model.eval()
    assert torch.equal(again.model(**inputs).logits, performer.model(**inputs).logits)
    assert torch.equal(again.model.model.aligner.patches.mean, performer.model.model.aligner.patches.mean)
    assert performer.model.model.aligner.patches.mean.abs().max() > 0.1, "the features' mean was measured"
    automatic = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(automatic, SlideVLM)


@torch.no_grad()
def test_what_is_seen_changes_the_logits_behind_it(performer, inputs):
    before = performer.model(**inputs).logits
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][:4, :WIDTH] += 1.0  # the first row's image
    after = performer.model(**changed).logits
    assert not torch.allclose(after[0, -1], before[0, -1])
    assert torch.equal(after[1:], before[1:])
    moved = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    moved["pixel_values"][:4, WIDTH] = 0.9  # the same tokens elsewhere
    assert not torch.allclose(performer.model(**moved).logits[0, -1], before[0, -1])


@pytest.mark.parametrize("rows", [19, 21])
def test_visual_rows_that_do_not_fit_the_image_tokens_are_refused(performer, inputs, rows):
    pixels = inputs["pixel_values"].repeat(2, 1)[:rows]
    with pytest.raises(ValueError, match=f"20 image tokens in the text but {rows} visual tokens"):
        performer.model(**{**inputs, "pixel_values": pixels})


@torch.no_grad()
def test_generation_with_a_cache_is_the_argmax_without(performer, cases):
    for case, budget in zip(cases[:3], (16, 0, 4), strict=True):
        inputs = batch(performer, [case], [budget])
        with_cache = performer.model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        ids = inputs["input_ids"]
        for _ in range(6):
            seen = {k: inputs[k] for k in ("pixel_values",) if k in inputs}
            logits = performer.model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert with_cache.tolist() == ids.tolist()


def test_labels_give_the_cross_entropy_of_the_next_token(performer, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out = performer.model(**inputs, labels=labels)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert out.loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_last_logits_are_kept_on_demand(performer, inputs, keep):
    whole = performer.model(**inputs).logits
    assert torch.allclose(performer.model(**inputs, logits_to_keep=keep).logits, whole[:, -keep:], atol=1e-6)


@pytest.mark.parametrize("tie", [False, True])
def test_a_language_model_joins_as_it_is(tmp_path, tie):
    tokenizer = train_tokenizer(["normal", "tumour"], 280)
    text = qwen(tie, len(tokenizer))
    text.save_pretrained(tmp_path / "lm")
    model = SlideVLM.from_language_model(str(tmp_path / "lm"), tokenizer, feature_dim=WIDTH, image_token_id=3).eval()
    ids = torch.tensor([tokenizer("normal tumour")["input_ids"]])
    with torch.no_grad():
        expected = text.eval()(ids).logits
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
        model.save_pretrained(tmp_path / "vlm")
        again = SlideVLM.from_pretrained(tmp_path / "vlm").eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tie
    again(ids, labels=ids).loss.backward()
    assert again.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_language_model_grows_for_the_image_token(tmp_path, bank, cases):
    tokenizer = train_tokenizer(["normal", "tumour"], 280)
    vocabulary = len(tokenizer)
    foreign = tokenizer.backend_tokenizer.to_str().replace(IMAGE_TOKEN, "<|other|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(foreign),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=tokenizer.chat_template,
    )
    qwen(True, vocabulary).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    performer = build_performer(PerformerConfig(language_model=str(tmp_path / "lm")), cases, bank)
    assert performer.processor.image_token_id == vocabulary
    embeddings = performer.model.get_input_embeddings()
    assert embeddings.num_embeddings == vocabulary + 1
    assert performer.model.lm_head.out_features == performer.shape.vocab == vocabulary + 1
    answer = performer.answer(cases[:2], [4, 16], max_new_tokens=2)
    assert [a.visual for a in answer] == [4, 16]
    performer.save(tmp_path / "vlm")
    again = SlidePerformer.load(tmp_path / "vlm", bank)
    assert [a.text for a in again.answer(cases[:2], [4, 16], max_new_tokens=2)] == [a.text for a in answer]


def test_a_checkpoint_of_another_encoder_is_refused(performer, make_bank, cases, tmp_path):
    performer.save(tmp_path / "p")
    wide = grid_features(2, 2)
    wide.features = wide.features.repeat(2, 1)
    other = make_bank({"field0": wide})
    with pytest.raises(InputError, match=f"width {WIDTH}, the cases have {2 * WIDTH}"):
        build_performer(PerformerConfig(checkpoint=str(tmp_path / "p")), cases, other)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        build_performer(PerformerConfig(checkpoint=str(tmp_path / "nothing")), cases, other)


def test_the_configuration_survives_json(tmp_path):
    config = SlideVLMConfig(text_config=qwen(True, 50).config, feature_dim=5, image_token_id=7, aligner_width=9)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, SlideVLMConfig)
    assert (again.feature_dim, again.image_token_id, again.aligner_width) == (5, 7, 9)
    assert again.text_config.to_dict() == config.text_config.to_dict()
