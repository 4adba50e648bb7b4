from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from frugalpath.allocator.network import AllocatorConfig, AllocatorInputs
from frugalpath.errors import InputError
from frugalpath.models import performer as module
from frugalpath.models.cost import TowerShape
from frugalpath.models.performer import question_text
from tests.conftest import WIDTH, noise


def test_answers_come_in_the_order_of_the_cases(performer, cases):
    budgets = [16, 0, 4, 1, 16, 4, 0, 1]
    together = performer.answer(cases, budgets, max_new_tokens=5, batch_size=3)
    for case, budget, answer in zip(cases, budgets, together, strict=True):
        (alone,) = performer.answer([case], [budget], max_new_tokens=5)
        assert (answer.text, answer.visual, answer.prompt) == (alone.text, alone.visual, alone.prompt)
        assert answer.visual == budget
        assert 1 <= answer.generated <= 5
        assert answer.seconds > 0
    prompts = [a.prompt for a in together]
    assert prompts[:3] == sorted(set(prompts[:3])), "prompts differ in length"


def test_no_budget_shows_nothing(performer, cases):
    assert performer.see(cases[0], 0) == []
    blank = performer.answer(cases[:2], [0, 0], max_new_tokens=3)
    assert [a.visual for a in blank] == [0, 0]
    # The same question over other fields: without a look the answers are equal.
    other = [dataclasses.replace(cases[0], images=("field5",)), cases[1]]
    assert [a.text for a in performer.answer(other, [0, 0], max_new_tokens=3)] == [a.text for a in blank]


def test_several_images_share_the_budget(performer, cases):
    both = dataclasses.replace(cases[0], images=("field0", "field1"), slides=("field2",))
    assert performer.sources(both) == ("field0", "field1", "field2")
    assert [(v.source, len(v)) for v in performer.see(both, 12)] == [("field0", 4), ("field1", 4), ("field2", 4)]
    assert sum(map(len, performer.see(both, 16))) <= 16
    assert [v.source for v in performer.see(both, 2)] == ["field0", "field1"], "there is none for the third"
    assert [v.slide for v in performer.see(both, 3)] == [0, 1, 2]


def test_a_slide_without_features_is_left_out_and_the_others_keep_their_numbers(make_performer, cases, monkeypatch):
    performer = make_performer(markers="unique", max_slides=3)
    performer.model.eval()
    case = dataclasses.replace(cases[0], images=(), slides=("field0", "lost", "field2"))
    monkeypatch.setattr(performer.bank, "missing", {"lost": "no tissue"})
    assert performer.sources(case) == ("field0", "field2")
    views = performer.see(case, 12)
    assert [(view.source, view.slide, view.budget) for view in views] == [("field0", 0, 6), ("field2", 2, 6)]
    assert performer.answer([case], [12], max_new_tokens=2)[0].visual == sum(view.tokens for view in views)
    looked = AllocatorInputs(performer, AllocatorConfig(ladder=(1, 4), look=(1,), feature_dim=WIDTH))([case])[0]
    both = dataclasses.replace(case, slides=("field0", "field2"))
    assert torch.equal(
        looked, AllocatorInputs(performer, AllocatorConfig(ladder=(1, 4), look=(1,), feature_dim=WIDTH))([both])[0]
    )


@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_with_its_end_token(performer, cases, several):
    free = performer.answer(cases[:1], [4], max_new_tokens=6)[0]
    assert free.generated == 6
    # Whatever this model writes third becomes the end token.
    prompt = performer.prompt(cases[0], 4)
    inputs = {"input_ids": prompt.ids[None], **performer.processor.sight.fields(prompt.views)}
    written = performer.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    third = written[2]
    unused = next(t for t in range(20, 200) if t not in written)
    performer.model.generation_config.eos_token_id = [unused, third] if several else third
    answer = performer.answer(cases[:1], [4], max_new_tokens=6)[0]
    assert answer.generated == written.index(third) + 1
    assert free.text.startswith(answer.text.rstrip("\ufffd"))


def test_the_tokenizer_ends_answers_where_the_model_names_no_end(performer, cases):
    prompt = performer.prompt(cases[0], 4)
    inputs = {"input_ids": prompt.ids[None], **performer.processor.sight.fields(prompt.views)}
    written = performer.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    performer.model.generation_config.eos_token_id = None
    performer.processor.tokenizer.eos_token_id = written[1]
    assert performer.answer(cases[:1], [4], max_new_tokens=6)[0].generated == written.index(written[1]) + 1


def test_image_tokens_are_never_written(performer, cases):
    image = performer.processor.image_token_id

    def insist(module, inputs, logits):
        logits[..., image] += 1e4

    free = performer.answer(cases[:4], [4] * 4, max_new_tokens=3)
    performer.model.lm_head.register_forward_hook(insist)
    assert [a.text for a in performer.answer(cases[:4], [4] * 4, max_new_tokens=3)] == [a.text for a in free]
    prompt = performer.prompt(cases[0], 4)
    assert int(performer.model(prompt.ids[None]).logits[0, -1].argmax()) == image


def test_answering_leaves_the_mode_and_draws_nothing(performer, cases):
    performer.model.train()
    first = [a.text for a in performer.answer(cases[:3], [4, 4, 4], max_new_tokens=4)]
    assert performer.model.training
    assert [a.text for a in performer.answer(cases[:3], [4, 4, 4], max_new_tokens=4)] == first


@pytest.mark.parametrize(("show", "expected"), [(True, "Q?\nOptions: a, b"), (False, "Q?")])
def test_options_are_listed_on_demand(cases, show, expected):
    case = dataclasses.replace(cases[0], prompt="Q?", options=("a", "b"), answer="a")
    assert question_text(case, show) == expected
    assert question_text(dataclasses.replace(case, options=None), show) == "Q?"


def test_the_conversation_puts_images_before_the_question(performer, cases):
    performer.system = "You are a pathologist."
    seen = performer.see(cases[0], 4)
    system, user = performer.messages(cases[0], seen)
    assert system == {"role": "system", "content": [{"type": "text", "text": "You are a pathologist."}]}
    assert [p["type"] for p in user["content"]] == ["image", "text"]
    assert user["content"][0]["image"] is seen[0]


@pytest.fixture
def read(monkeypatch) -> list:
    """Messages of every prompt that is rendered."""
    rendered = []

    def count(processor, sight, messages):
        rendered.append(messages)
        return original(processor, sight, messages)

    original = module.read_prompt
    monkeypatch.setattr(module, "read_prompt", count)
    return rendered


@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_a_prompt_is_rendered_once(request, family, read, cases, image_cases):
    made = request.getfixturevalue(family)
    case, other = (image_cases[0], image_cases[4]) if family == "qwen" else (cases[0], cases[1])
    first = made.prompt(case, 16)
    assert made.prompt(case, 16).ids is first.ids
    assert len(read) == 1
    made.answer([case, case], [16, 16], max_new_tokens=1)
    assert len(read) == 1
    shorter, blank = made.prompt(case, 4), made.prompt(case, 0)
    assert len(read) == 3
    # Only the visual tokens differ.
    image = made.processor.image_token_id
    assert [int((p.ids == image).sum()) for p in (first, shorter, blank)] == [16, 4, 0]
    texts = [[t for t in p.ids.tolist() if t != image] for p in (first, shorter)]
    assert texts[0] == texts[1]
    assert [sum(map(len, p.views)) for p in (first, shorter, blank)] == [16, 4, 0]
    assert made.prompt(other, 16).ids.tolist() != first.ids.tolist()
    assert len(read) == 4


def test_equal_counts_in_another_grid_are_another_prompt(qwen, read, image_cases, tmp_path):
    wide, tall = (str(tmp_path / f"{w}x{h}.png") for w, h in ((224, 56), (56, 224)))
    noise(224, 56, 0).save(wide)
    noise(56, 224, 1).save(tall)
    first, second = (qwen.prompt(dataclasses.replace(image_cases[0], images=(path,)), 16) for path in (wide, tall))
    assert torch.equal(first.ids, second.ids) and not torch.equal(first.positions, second.positions)
    assert len(read) == 2


def test_the_oldest_prompt_is_forgotten_first(performer, read, cases, monkeypatch):
    monkeypatch.setattr(module, "PROMPTS_KEPT", 2)
    for index in (0, 1, 0, 2, 1, 2):
        performer.prompt(cases[index], 4)
    assert len(read) == 3
    performer.prompt(cases[0], 4)
    assert len(read) == 4


@pytest.mark.parametrize("family", ["performer", "qwen"])
def test_a_rendered_prompt_keeps_no_view_alive(request, family, cases, image_cases):
    made = request.getfixturevalue(family)
    prompt = made.prompt((image_cases if family == "qwen" else cases)[0], 16)
    view = weakref.ref(prompt.views[0])
    del prompt
    if family == "qwen":
        made._view.cache_clear()
    else:
        made.bank._made.clear()
        made.bank._held = 0
    gc.collect()
    assert view() is None


# Qwen2.5-VL.


def test_images_are_shown_at_their_budget(qwen, image_cases):
    for budget in (1, 4, 16):
        views = qwen.see(image_cases[0], budget)
        assert [(v.source, len(v)) for v in views] == [(image_cases[0].images[0], budget)]
    assert qwen.see(image_cases[0], 0) == [] == qwen.see(image_cases[2], 16)
    assert qwen.see(image_cases[0], 4)[0] is qwen.see(image_cases[0], 4)[0], "what a view remembers serves again"


def test_images_of_a_case_share_the_budget(qwen, image_cases):
    views = qwen.see(image_cases[5], 18)
    assert [v.source for v in views] == list(image_cases[5].images)
    assert [v.budget for v in views] == [6, 6, 6]
    assert [len(v) for v in views] == [4, 4, 1], "what an image can use of its share"


def test_realised_tokens_are_reported(qwen, image_cases):
    budgets = (16, 10, 16, 12, 0, 18)
    answers = qwen.answer(image_cases, budgets, max_new_tokens=4, batch_size=4)
    shown = [sum(map(len, qwen.see(c, b))) for c, b in zip(image_cases, budgets, strict=True)]
    assert [a.visual for a in answers] == shown
    assert shown[0] == 16 and shown[2] == shown[4] == 0 and shown[5] == 9
    for case, budget, answer in zip(image_cases, budgets, answers, strict=True):
        prompt = qwen.prompt(case, budget)
        assert answer.prompt == len(prompt) - answer.visual
        assert (qwen.answer([case], [budget], max_new_tokens=4)[0].text) == answer.text


def test_slides_are_refused(qwen, image_cases):
    case = dataclasses.replace(image_cases[0], slides=("slide.svs",))
    for budget in (0, 16):
        with pytest.raises(InputError, match=f"case {case.id}: it shows slides.*slide_vlm, or cut fields of view"):
            qwen.see(case, budget)


def test_a_case_whose_image_is_missing_is_named(qwen, image_cases, tmp_path):
    case = dataclasses.replace(image_cases[0], images=(str(tmp_path / "gone.png"),))
    with pytest.raises(InputError, match=r"gone\.png: cannot be read as an image"):
        qwen.answer([case], [4])


# What seeing costs.


def test_seeing_costs_a_run_of_the_tower(qwen, image_cases):
    tower = TowerShape.from_config(qwen.model.config.vision_config)
    views = qwen.see(image_cases[3], 12)
    assert len(views) == 2 and qwen.seeing(views) == sum(tower.read(len(v)) for v in views)
    assert qwen.seeing([]) == 0 < qwen.seeing(views[:1]) < qwen.seeing(views)


def test_stored_features_cost_the_aligner_alone(performer, cases):
    products = [m for m in performer.model.model.aligner.modules() if isinstance(m, torch.nn.Linear)]
    assert len(products) == 3
    prompt = performer.prompt(cases[0], 7)
    seen = sum(2 * prompt.visual * m.in_features * m.out_features for m in products)
    assert prompt.visual == 6 and performer.seeing(prompt.views) == seen
    assert performer.flops(prompt, 3) == performer.shape.answer(6, prompt.text, 3) + seen
    (answer,) = performer.answer(cases[:1], [7], max_new_tokens=3)
    assert answer.flops == performer.flops(prompt, answer.generated)


def test_the_language_model_alone_gives_the_shape(qwen, performer):
    for made in (qwen, performer):
        text = made.model.config.get_text_config()
        assert made.shape.layers == text.num_hidden_layers and made.shape.vocab == len(made.processor.tokenizer)


def test_the_question_is_put_twice_on_demand(make_performer, cases):
    made = make_performer(repeat_prompt=True)
    (user,) = made.messages(cases[0])
    assert user["content"][0]["text"] == f"{cases[0].prompt}\n{cases[0].prompt}"
    assert make_performer().messages(cases[0])[0]["content"][0]["text"] == cases[0].prompt
