from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalpath.models.tokenizer import IMAGE_TOKEN, TAGS, train_tokenizer
from frugalpath.rewards.registry import gold_completion


@functools.cache
def tokenizer():
    return train_tokenizer(["Is this tissue normal or tumour?", "normal", "tumour"], 300)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text):
    ids = encode(text)
    assert max(ids, default=0) < len(tokenizer())
    assert tokenizer().decode(ids) == text


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_one_token_that_survives_decoding(tag):
    ids = encode(f"a{tag}b")
    assert encode(tag) == [tokenizer().convert_tokens_to_ids(tag)]
    assert len(ids) == 3
    assert tokenizer().decode(ids, skip_special_tokens=True) == f"a{tag}b"


def test_an_answer_is_decoded_as_it_was_taught():
    text = gold_completion({"answer": "tumour"})
    assert tokenizer().decode(encode(text + tokenizer().eos_token), skip_special_tokens=True) == text


def test_special_tokens_are_single_and_left_out_of_answers():
    for token in (IMAGE_TOKEN, tokenizer().eos_token, tokenizer().pad_token):
        assert len(encode(token)) == 1
        assert tokenizer().decode(encode(f"a{token}b"), skip_special_tokens=True) == "ab"
    assert tokenizer().eos_token_id != tokenizer().pad_token_id


def test_training_is_the_same_whatever_the_order_of_texts():
    texts = ["one gland", "two glands", "no gland"]
    assert train_tokenizer(texts, 290).get_vocab() == train_tokenizer(texts[::-1] + texts, 290).get_vocab()


def test_the_vocabulary_keeps_to_its_size():
    # The five tags and two role lines come on top: tags, "user\n" and "assistant\n".
    assert len(train_tokenizer(["normal tumour " * 3], 280)) <= 280 + len(TAGS) + 2


def test_the_chat_template_opens_the_assistant_turn():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
