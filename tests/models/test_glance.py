from __future__ import annotations

import copy

import pytest
import torch

from models.allocators.glance import OPENING, Glance
from models.allocators.look import CheapLook
from models.allocators.network import AllocatorConfig, Look, widened
from models.allocators.value import ValueAllocator
from models.generation import read_ends
from tests.conftest import LADDER, WIDTH


def config(**changes) -> AllocatorConfig:
    return AllocatorConfig(
        **{"ladder": LADDER, "look": (1, 4), "feature_dim": WIDTH, "width": 16, "buckets": 64, **changes}
    )


@torch.no_grad()
def test_ends_of_prompts_are_those_of_the_whole_forward(performer, cases):
    prompts = [performer.prompt(c, b) for c, b in zip(cases[:4], (1, 16, 0, 4), strict=True)]
    states, logits = read_ends(performer.model, performer.processor.sight, prompts, cap=3)
    for prompt, state, logit in zip(prompts, states, logits, strict=True):
        inputs = performer.processor.sight.inputs(performer.model, [prompt.views])
        out = performer.model(input_ids=prompt.ids[None], **inputs)
        assert torch.allclose(logit, out.logits[0, -1], atol=1e-5)
        assert torch.allclose(performer.model.lm_head(state), out.logits[0, -1], atol=1e-5)


def test_ends_of_another_model_too(qwen, image_cases):
    prompts = [qwen.prompt(c, 4) for c in image_cases[:3]]
    states, logits = read_ends(qwen.model, qwen.processor.sight, prompts)
    assert states.shape == (3, qwen.shape.hidden)
    head = qwen.model.get_output_embeddings()
    with torch.no_grad():
        assert torch.allclose(head(states), logits, atol=1e-5)


@torch.no_grad()
def test_a_glance_is_the_state_where_the_answer_begins(performer, cases):
    glance = Glance(performer, 4, True, True)
    seen = glance(cases[:3])
    assert seen.shape == (3, Glance.width(performer, True, True)) == (3, performer.shape.hidden + 2)
    prompt = performer.prompt(cases[1], 4)
    opening = performer.processor.tokenizer(OPENING)["input_ids"]
    assert len(opening) == 3, "tags are single tokens"
    ids = torch.cat([prompt.ids, torch.tensor(opening)])[None]
    logits = performer.model(input_ids=ids, **performer.processor.sight.inputs(performer.model, [prompt.views])).logits
    p = logits[0, -1].softmax(-1)
    assert seen[1, -2].item() == pytest.approx(p.max().logit().item(), rel=1e-4)
    assert seen[1, -1].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)
    assert torch.equal(Glance(performer, 4, True, False)(cases[:3]), seen[:, :-2])
    assert torch.equal(Glance(performer, 4, False, True)(cases[:3]), seen[:, -2:])
    assert not torch.allclose(Glance(performer, 16, True, True)(cases[:3]), seen)


def test_the_same_budget_is_not_paid_for_twice(performer, qwen, cases, image_cases):
    for own, case in ((performer, cases[0]), (qwen, image_cases[0])):
        glance, prompt = Glance(own, 4, True, False), own.prompt(case, 4)
        opening = 3
        length = len(prompt)
        shape = own.shape
        extra = glance.flops(case) - glance.spared(case, prompt)
        assert extra == pytest.approx(shape.read(length + opening) - shape.read(length))
        assert glance.spared(case, own.prompt(case, 16)) < glance.flops(case) / 2
    assert glance.spared(case, qwen.prompt(case, 16)) == 0, "nothing else is taken over there"


def test_a_look_without_a_glance_is_as_it_was(performer, cases):
    look, question = CheapLook(performer, config())(cases[:2])
    assert isinstance(look, torch.Tensor)
    assert ValueAllocator(config()).beside is None
    richer, same = CheapLook(performer, config(look_state=1, state_dim=performer.shape.hidden))(cases[:2])
    assert isinstance(richer, Look) and len(richer) == 2
    assert torch.equal(richer.tokens, look) and torch.equal(question, same)
    assert torch.equal(richer[1:].state, richer.state[1:])


@torch.no_grad()
def test_a_widened_allocator_decides_as_before_until_it_is_fitted(performer, cases):
    torch.manual_seed(0)
    start = ValueAllocator(config()).eval()
    before = copy.deepcopy(start.state_dict())
    wide = widened(start, look_state=4, look_confidence=4, state_dim=performer.shape.hidden + 2).eval()
    look, question = CheapLook(performer, wide.config)(cases)
    wide.standardise(look)
    start.standardise(look.tokens)
    assert torch.equal(wide(look, question), start(look.tokens, question))
    assert wide.flops(1) > start.flops(1)
    assert torch.equal(before["see.weight"], wide.state_dict()["see.weight"])
    torch.nn.init.ones_(wide.beside.layers[-1].weight)
    assert not torch.allclose(wide(look, question), start(look.tokens, question))


def test_a_widened_allocator_is_saved_whole(performer, cases, tmp_path):
    wide = widened(ValueAllocator(config()), look_confidence=1, state_dim=2).eval()
    look, question = CheapLook(performer, wide.config)(cases[:2])
    torch.nn.init.ones_(wide.beside.layers[-1].weight)
    wide.save_pretrained(tmp_path)
    again = ValueAllocator.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(look, question), wide(look, question))


def test_a_look_at_the_question_alone(performer, cases):
    allocator = ValueAllocator(config(look=()))
    look, question = CheapLook(performer, allocator.config)(cases[:2])
    allocator.standardise(look)
    out = allocator(look, question)
    assert out.shape == (2, 3) and out.isfinite().all() and allocator.mean.eq(0).all()
