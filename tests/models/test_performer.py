from __future__ import annotations

import dataclasses

import pytest

from models.performer import question_text


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


def test_an_answer_ends_with_its_end_token(performer, cases):
    free = performer.answer(cases[:1], [4], max_new_tokens=6)[0]
    assert free.generated == 6
    # Whatever this model writes third becomes the end token.
    inputs = performer.processor(
        images=[performer.see(cases[0], 4)],
        text=performer.processor.apply_chat_template(
            [performer.messages(cases[0], performer.see(cases[0], 4))], add_generation_prompt=True
        ),
        return_tensors="pt",
    )
    written = performer.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    third = written[2]
    performer.processor.tokenizer.eos_token_id = third
    assert performer.answer(cases[:1], [4], max_new_tokens=6)[0].generated == written.index(third) + 1


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
    assert system == {"role": "system", "content": "You are a pathologist."}
    assert [p["type"] for p in user["content"]] == ["image", "text"]
    assert user["content"][0]["image"] is seen[0]
