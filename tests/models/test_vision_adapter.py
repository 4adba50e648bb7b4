from __future__ import annotations

import numpy as np
import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.models.feature_bank import VisualTokens
from frugalpath.models.qwen_vl import VISION_MARKS
from frugalpath.models.tokenizer import IMAGE_TOKEN, train_tokenizer
from frugalpath.models.vision_adapter import (
    Prompt,
    SlideVisionAdapter,
    TextVisionAdapter,
    VisionAdapter,
    images_of,
    lay_out,
    read_prompt,
    stack_positions,
)
from tests.conftest import WIDTH, noise


def ask(text: str, *images) -> list[dict]:
    parts = [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def read(performer, messages, **template) -> Prompt:
    return read_prompt(performer.processor, performer.processor.sight, messages, **template)


# Reading prompts.


def test_every_view_has_its_tokens(performer, bank):
    views = [bank.see("field0", 4), bank.see("field1", 1)]
    prompt = read(performer, ask("Which?", *views))
    image, tokenizer = performer.processor.image_token_id, performer.processor.tokenizer
    question = tokenizer("Which?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert prompt.ids.tolist() == [*tokenizer("<|im_start|>user\n")["input_ids"], *[image] * 5, *question]
    assert prompt.views == tuple(views)
    assert prompt.positions.tolist() == [list(range(len(prompt)))]
    assert prompt.next_position == len(prompt) == len(prompt.ids)


def test_images_keep_their_places_between_texts(qwen):
    one, four = noise(28, 28, 0), noise(56, 56, 1)
    qwen.processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 784 * 16}
    parts = [
        {"type": "text", "text": "Left"},
        {"type": "image", "image": four},
        {"type": "text", "text": " and right"},
        {"type": "image", "image": one},
    ]
    messages = [{"role": "system", "content": "Compare."}, {"role": "user", "content": parts}]
    prompt = read(qwen, messages)
    start, end = VISION_MARKS
    expected = (
        "<|im_start|>system\nCompare.<|im_end|>\n<|im_start|>user\n"
        f"Left{start}{IMAGE_TOKEN * 4}{end} and right{start}{IMAGE_TOKEN}{end}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.ids.tolist() == qwen.processor.tokenizer(expected)["input_ids"]
    assert [len(v) for v in prompt.views] == [4, 1]
    assert [v.source for v in prompt.views] == [four, one]
    # The 2 x 2 square takes two positions, the single token one; all else counts on.
    assert prompt.positions.shape == (3, len(prompt))
    assert prompt.next_position == len(prompt) - 2


def test_ids_and_positions_are_those_of_the_processor(performer, qwen, cases, image_cases):
    for made, case, budget in ((performer, cases[0], 16), (qwen, image_cases[3], 12), (qwen, image_cases[2], 12)):
        views = made.see(case, budget)
        messages = made.messages(case, views)
        prompt = read(made, messages)
        (ids,) = made.processor.apply_chat_template([messages], tokenize=True, add_generation_prompt=True)
        assert prompt.ids.tolist() == ids
        assert int((prompt.ids == made.processor.image_token_id).sum()) == sum(map(len, views))


@pytest.mark.parametrize("role", ["user", "system"])
@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_an_image_token_in_a_text_is_refused(request, family, role, image_cases, cases):
    made = request.getfixturevalue(family)
    (view,) = made.see((image_cases if family == "qwen" else cases)[0], 4)
    message = rf"2 places for images and 1 images.*'{IMAGE_TOKEN.replace('|', '[|]')}'.*remove it"
    texts = {"user": "What is", "system": "Answer."}
    texts[role] += f" {IMAGE_TOKEN} this"
    messages = [{"role": "system", "content": texts["system"]}, *ask(texts["user"], view)]
    with pytest.raises(InputError, match=message):
        read(made, messages)
    with pytest.raises(InputError, match="1 places for images and 0 images"):
        read(made, [{"role": "system", "content": texts["system"]}, {"role": "user", "content": texts["user"]}])


@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_an_image_token_in_a_plain_text_is_refused(request, family):
    with pytest.raises(InputError, match="remove it"):
        read(request.getfixturevalue(family), f"What is {IMAGE_TOKEN} this?")


@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_a_plain_text_is_tokenized_as_it_is(request, family):
    made = request.getfixturevalue(family)
    prompt = read(made, "Is it a tumour?")
    assert prompt.ids.tolist() == made.processor.tokenizer("Is it a tumour?")["input_ids"]
    assert prompt.views == ()
    assert torch.equal(prompt.positions, torch.arange(len(prompt)).expand(len(prompt.positions), -1))


def test_a_text_model_reads_conversations():
    tokenizer = train_tokenizer(["tumour"], 280)
    messages = [{"role": "user", "content": "tumour?"}]
    prompt = read_prompt(tokenizer, TextVisionAdapter(), messages)
    expected = "<|im_start|>user\ntumour?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids.tolist() == tokenizer(expected)["input_ids"]
    assert read_prompt(tokenizer, TextVisionAdapter(), "tumour?").ids.tolist() == tokenizer("tumour?")["input_ids"]
    # It has no image token, so that none stands for an image.
    assert IMAGE_TOKEN in tokenizer.decode(read_prompt(tokenizer, TextVisionAdapter(), f"a {IMAGE_TOKEN}").ids)


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if thinking is defined %} thinking {{ thinking }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ({}, "What?"),
        ({"thinking": False}, "What? thinking False"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}, "What?1 tools"),
    ],
)
@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_arguments_reach_the_chat_template(request, family, template, expected):
    made = request.getfixturevalue(family)
    prompt = read(made, ask("What?"), chat_template=TEMPLATE, **template)
    assert made.processor.tokenizer.decode(prompt.ids) == expected


def test_images_of_a_conversation_come_in_order():
    first, second = ask("a", 1, 2), ask("b", 3)
    assert images_of([{"role": "system", "content": "text"}, *first, *second]) == [1, 2, 3]


def test_a_prompt_is_laid_out_from_its_ids(qwen, image_cases):
    prompt = qwen.prompt(image_cases[3], 12)
    again = lay_out(qwen.processor.sight, prompt.ids.tolist(), prompt.views)
    assert torch.equal(again.ids, prompt.ids) and torch.equal(again.positions, prompt.positions)


# The simple families.


def test_stored_features_are_handed_on(bank):
    sight = SlideVisionAdapter(3)
    views = [bank.see("field0", 4), bank.see("field1", 1)]
    assert [sight.view(v) for v in views] == views
    fields = sight.fields(views)
    assert torch.equal(fields["pixel_values"], torch.cat([v.rows for v in views]))
    assert fields["image_grid_thw"].tolist() == [[1, 1, 4], [1, 1, 1]]
    inputs = sight.inputs(None, [views])
    assert torch.equal(inputs["pixel_values"], fields["pixel_values"])
    assert inputs["shown"].tolist() == [[4, 4, 0, 0], [1, 1, 0, 0]]
    apart = sight.inputs(None, [[], views[:1], views[1:]])
    assert apart["shown"][:, 2].tolist() == [1, 2], "rows of the batch that the views belong to"
    assert sight.inputs(None, []) == {}
    assert sight.positions(torch.tensor([5, 3, 3, 6]), views).tolist() == [[0, 1, 2, 3]]
    assert isinstance(views[0], VisualTokens) and views[0].rows.shape == (4, WIDTH + 4)


@pytest.mark.parametrize("image", ["field.png", noise(28, 28, 0), np.zeros(3)])
def test_images_that_are_not_encoded_are_refused(image):
    with pytest.raises(InputError, match=f"is a {type(image).__name__}; slide_vlm reads stored features"):
        SlideVisionAdapter(3).view(image)


def test_a_text_model_refuses_images():
    with pytest.raises(InputError, match="use a vision-language model"):
        read_prompt(train_tokenizer(["a"], 280), TextVisionAdapter(), ask("What?", noise(28, 28, 0)))
    assert TextVisionAdapter().fields([]) == {} and TextVisionAdapter().inputs(None, [[]]) == {}


def test_a_sight_of_no_family_sees_nothing():
    sight = VisionAdapter(None)
    with pytest.raises(NotImplementedError):
        sight.view("image")
    with pytest.raises(NotImplementedError):
        sight.fields([])


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_a_batch_are_padded_with_0(axes, side):
    rows = [torch.arange(1, 1 + axes * n).view(axes, n) for n in (2, 4)]
    stacked = stack_positions(rows, side)
    assert stacked.shape == ((2, 4) if axes == 1 else (3, 2, 4))
    (short, pad), whole = (stacked[..., 0, :].split(2, -1), stacked[..., 1, :])
    if side == "left":
        short, pad = pad, short
    assert torch.equal(short.reshape(axes, 2), rows[0]) and torch.equal(whole.reshape(axes, 4), rows[1])
    assert not pad.any()
