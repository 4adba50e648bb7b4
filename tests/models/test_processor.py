from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from frugalpath.models.processor import SlideProcessor
from frugalpath.models.tokenizer import IMAGE_TOKEN


@pytest.fixture
def processor(performer) -> SlideProcessor:
    return performer.processor


def test_an_image_takes_as_many_tokens_as_it_has_rows(processor, bank):
    four, whole = bank.see("field0", 4), bank.see("field1", 100)
    out = processor(
        images=[[four], [whole]], text=[f"a{IMAGE_TOKEN}b", f"{IMAGE_TOKEN}c"], padding=True, return_tensors="pt"
    )
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 36]
    assert out["attention_mask"].sum(1).tolist() == [6, 37]
    assert out["image_grid_thw"].prod(-1).tolist() == [4, 36]
    assert torch.equal(out["pixel_values"], torch.cat([four.rows, whole.rows]))
    assert out["attention_mask"][0, 0] == 0, "padding is on the left, where generation wants it"


def test_several_images_of_one_text_keep_their_places(processor, bank):
    one, four = bank.see("field0", 1), bank.see("field1", 4)
    out = processor(images=[[one, four]], text=[f"{IMAGE_TOKEN}x{IMAGE_TOKEN}y"])
    image = processor.image_token_id
    x, y = processor.tokenizer("xy")["input_ids"]
    assert out["input_ids"] == [[image, x, *[image] * 4, y]]
    assert torch.equal(out["pixel_values"], torch.cat([one.rows, four.rows]))


def test_a_text_without_images_has_no_pixels(processor):
    assert set(processor(text="abc")) == {"input_ids", "attention_mask"}
    assert set(processor(images=[[]], text=["abc"])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("places", [0, 2])
def test_images_without_their_places_are_refused(processor, bank, places):
    with pytest.raises(ValueError, match=f"1 images for {places} image places"):
        processor(images=[[bank.see("field0", 4)]], text=[f"a{IMAGE_TOKEN * places}"])


def test_rendering_and_tokenizing_agree(performer, processor, cases):
    conversations = [performer.messages(c, performer.see(c, b)) for c, b in zip(cases[:3], (4, 0, 16), strict=True)]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    images = [[p["image"] for p in m[-1]["content"] if p["type"] == "image"] for m in conversations]
    by_hand = processor(images=images, text=texts)
    out = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert out["input_ids"] == by_hand["input_ids"]
    assert torch.equal(out["pixel_values"], by_hand["pixel_values"])
    assert [row.count(processor.image_token_id) for row in out["input_ids"]] == [4, 0, 16]
    assert processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True) == out["input_ids"]


def test_one_conversation_gives_one_text(performer, processor, cases):
    messages = performer.messages(cases[0], performer.see(cases[0], 4))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>user\n{IMAGE_TOKEN}Is this tissue normal or tumour?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_saved_processor_tokenizes_alike(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = SlideProcessor(AutoTokenizer.from_pretrained(tmp_path))
    messages = [{"role": "user", "content": "normal?"}]
    assert again.apply_chat_template(messages, tokenize=True) == processor.apply_chat_template(messages, tokenize=True)
    assert again.image_token_id == processor.image_token_id
    assert again.tokenizer.padding_side == "left"
