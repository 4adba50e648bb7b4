"""The allocator that writes a budget: what it is asked, how it is read, and that it leaves the performer as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

from frugalpath.allocator.text import BudgetWriter, read_budget
from frugalpath.envs.case import Case
from frugalpath.errors import InputError

PUBLISHED = (
    "Allocate the optimal token number for the image based on the pathology task. Generally, simple images and tasks "
    "receive fewer tokens and complex ones receive more tokens. The current input token number is 4 and a maximum "
    "limit is 36. The pathology task is: Is this tissue normal or tumour?. The answer should be a positive integer of "
    "the image token number."
)


@pytest.fixture
def allocator(performer) -> BudgetWriter:
    return BudgetWriter(performer, {"r": 4}, look=4, default=16)


def test_the_prompt_is_the_published_one(allocator, cases):
    prompt = allocator.prompt(cases[0])
    system, user = allocator.messages(cases[0], prompt.views)
    assert user["content"] == [{"type": "image", "image": prompt.views[0]}, {"type": "text", "text": PUBLISHED}]
    assert "<think> reasoning process here </think><answer> answer here </answer>" in system["content"][0]["text"]
    assert prompt.visual == 4
    written = allocator.performer.processor.tokenizer.decode(prompt.ids)
    assert PUBLISHED in written and written.count("<|image_pad|>") == 4
    assert PUBLISHED not in allocator.performer.processor.tokenizer.decode(allocator.performer.prompt(cases[0], 4).ids)


@pytest.mark.parametrize(
    ("size", "native", "capped"), [((2048, 2048), 5329, 256), ((768, 1024), 999, 234), ((1166, 1440), 2142, 238)]
)
def test_the_native_count_knows_no_cap(qwen, tmp_path, size, native, capped):
    """The published table (methods 1.10)."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    case = Case("a", "p", "open", "What?", "-", images=(str(tmp_path / "a.png"),))
    allocator = BudgetWriter(qwen, {"r": 4}, look=256, default=256)
    (view,) = qwen.see(case, 256)
    assert (allocator.native(case), len(view)) == (native, capped)
    text = allocator.messages(case, [view])[1]["content"][1]["text"]
    assert f"number is {capped} and a maximum limit is {native}." in text
    assert allocator.held(case, 10**6) == min(8192, native)


def test_several_slides_are_counted_together(allocator, cases):
    case = Case("both", "p", "open", "What?", "-", images=("field0", "field1"))
    assert allocator.native(case) == 72 and allocator.native(cases[0]) == 36


@pytest.mark.parametrize(
    ("answer", "number"),
    [("128", 128), ("12 or 300", 12), ("1", None), ("many", None), ("4000", 4000), ("1 then 7", 7), ("2.5", None)],
)
def test_budgets_are_read_as_published(answer, number):
    assert read_budget(f"<think></think><answer>{answer}</answer>") == number
    assert read_budget([{"role": "assistant", "content": f"<answer>{answer}</answer>"}]) == number
    assert read_budget(answer) is None, "not within the answer"


@pytest.mark.parametrize(("number", "budget"), [(None, 16), (0, 2), (2, 2), (30, 30), (36, 36), (37, 36), (9999, 36)])
def test_a_budget_is_held_to_what_the_image_can_give(allocator, cases, number, budget):
    assert allocator.held(cases[0], number) == budget


def test_the_published_limits(allocator, cases, monkeypatch):
    monkeypatch.setattr(allocator.performer, "native", lambda source: 10_000)
    monkeypatch.setattr(allocator.performer, "room", lambda source: 10_000)
    assert [allocator.held(cases[0], n) for n in (1, 8192, 8193)] == [2, 8192, 8192]


def stir(allocator: BudgetWriter) -> None:
    """An adapter that says something else than its base."""
    for name, parameter in allocator.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)


def test_the_adapter_leaves_the_performer_as_it_is(performer, cases, tmp_path):
    before = copy.deepcopy(performer.model.state_dict())
    answers = performer.answer(cases, [16] * 8, 6)
    allocator = BudgetWriter(performer, {"r": 4}, look=4, default=16)
    own = [a.text for a in allocator.ask(cases, 6)]
    stir(allocator)
    asked = allocator.ask(cases, 6)
    assert [a.text for a in asked] != own, "the adapter is on when it asks"
    again = performer.answer(cases, [16] * 8, 6)
    assert [(a.text, a.confidence) for a in again] == [(a.text, a.confidence) for a in answers]
    now = {n.replace("base_layer.", ""): v for n, v in performer.model.state_dict().items() if "lora_" not in n}
    assert set(now) == set(before) and all(torch.equal(value, before[name]) for name, value in now.items())
    for one in asked:
        assert one.number is None and one.budget == 16
    plain = performer.flops(allocator.prompt(cases[0]), 6)
    assert plain < asked[0].flops < 1.5 * plain, "the adapter is paid for"
    allocator.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_saved_adapter_asks_for_the_same(make_performer, cases, tmp_path):
    allocator = BudgetWriter(make_performer(), {"r": 4}, look=4, default=16)
    stir(allocator)
    allocator.save(tmp_path / "adapter")
    read = BudgetWriter(make_performer(), tmp_path / "adapter", look=4, default=16)
    assert read.ask(cases, 6) == allocator.ask(cases, 6)


def test_an_unknown_key_of_the_adapter_is_told(performer):
    with pytest.raises(InputError, match=r"allocator.text.lora: .*rank.*LoraConfig"):
        BudgetWriter(performer, {"rank": 4}, look=4, default=16)
