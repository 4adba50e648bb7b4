from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from frugalpath.envs.case import Case
from frugalpath.models.reuse import Reader, embed, look_flops, shared, spared
from tests.conftest import grid_features

NESTED = [{"name": "pool", "nested": True}]
BUDGETS = (1, 5, 21, 36 + 21)
KINDS = {
    "nested": {"compressors": NESTED},
    "pool": {},
    "marked": {"compressors": NESTED, "markers": "unique", "max_slides": 4},
    "resampler": {"compressors": ["pool", {"name": "resampler", "latents": 64, "width": 16, "layers": 1, "heads": 2}]},
    "cross_attention": {"fusion": "cross_attention", "cross_layers": [0]},
}


@pytest.fixture(params=KINDS)
def kind(request, make_performer):
    """Name of a kind of performer, and one that writes answers of some length."""
    made = make_performer(layers=2, **KINDS[request.param])
    made.model.eval()
    if made.model.model.routes is not None:
        with torch.no_grad():
            made.model.model.routes.adapters[0].gate.fill_(2.0)  # a closed gate shows nothing
    # An untrained model would end its answers at once.
    made.model.generation_config.eos_token_id = 299
    return request.param, made


@pytest.fixture
def pair(bank) -> Case:
    """Two images to share a budget."""
    return Case("pair", "p", "choice", "Which?", "normal", images=("field0", "field1"), options=("normal", "tumour"))


def fresh(performer, case, budget):
    return performer.answer([case], [budget], 6)[0]


@pytest.mark.slow
@pytest.mark.parametrize("order", [BUDGETS, (57, 1, 21), (0, 5, 5, 1), (4, 16, 0)])
def test_answers_are_those_of_fresh_prompts(kind, cases, pair, order):
    name, performer = kind
    for case in (cases[1], pair):
        reader = Reader(performer, case, 6)
        prompts = [performer.prompt(case, b) for b in order]
        written = [fresh(performer, case, b).generated for b in order]
        expected = look_flops(performer, prompts, written)
        for k, budget in enumerate(order):
            answer, other = reader.answer(budget), fresh(performer, case, budget)
            assert answer.text == other.text and answer.generated == other.generated
            assert answer.confidence == pytest.approx(other.confidence, rel=1e-4)
            assert (answer.visual, answer.prompt) == (other.visual, other.prompt)
            assert answer.flops == pytest.approx(expected[k, k]), "row k follows look k - 1"
            if name == "cross_attention" and (k == 0 or order[k] != order[k - 1]):
                assert answer.flops == other.flops


def test_answers_differ_with_the_budget(kind, cases):
    """Otherwise the comparison above would say nothing about what is kept."""
    _, performer = kind
    sure = {Reader(performer, cases[0], 6).answer(b).confidence for b in (0, 1, 21)}
    assert len(sure) == 3


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations((0, 1, 5, 21, 57), 2)))
def test_what_is_kept_has_the_keys_of_a_fresh_prompt(kind, pair, before, after):
    """And the first token that is not kept is another one."""
    name, performer = kind
    prompts = [performer.prompt(pair, b) for b in (before, after)]
    kept = shared(performer, *prompts)
    assert kept < len(prompts[1])
    if name == "cross_attention":
        assert kept == 0
        return
    old, new = (embed(performer, p, 0)[0] for p in prompts)
    assert torch.allclose(old[:kept], new[:kept], atol=1e-6)
    if name != "resampler":  # whose tokens may agree by chance of how they are made
        assert not torch.allclose(old[kept], new[kept], atol=1e-6)
    assert torch.allclose(embed(performer, prompts[1], kept)[0], new[kept:], atol=1e-6)


def test_nested_looks_are_kept_whole(make_performer, cases):
    nested, plain = make_performer(compressors=NESTED), make_performer()
    for small, large in itertools.pairwise(BUDGETS):
        kept = [shared(p, p.prompt(cases[0], small), p.prompt(cases[0], large)) for p in (nested, plain)]
        # The text before the image is one token, <|im_start|>user being two.
        before = kept[1]
        assert kept[0] == before + small
        first = int((plain.prompt(cases[0], large).ids == 3).nonzero()[0])
        assert before == first


def test_looks_one_after_another_cost_what_is_new(make_performer, cases):
    """Every visual token is read once, the question once a look."""
    performer = make_performer(compressors=NESTED)
    prompts = [performer.prompt(cases[0], b) for b in BUDGETS]
    assert [p.visual for p in prompts] == list(BUDGETS)
    flops = look_flops(performer, prompts, [3] * len(BUDGETS))
    fresh = [performer.flops(p, 3) for p in prompts]
    np.testing.assert_allclose(flops[0], fresh)
    shape, before = performer.shape, prompts[0].text - (len(prompts[0]) - 1 - int((prompts[0].ids == 3).nonzero()))
    for k in range(1, len(BUDGETS)):
        kept = before + BUDGETS[k - 1]
        by_hand = shape.prefill(len(prompts[k]), kept) + shape.decode(3, len(prompts[k]))
        by_hand += performer.seeing(prompts[k].views) * (BUDGETS[k] - BUDGETS[k - 1]) / BUDGETS[k]
        assert flops[k, k] == pytest.approx(by_hand)
        assert flops[k, k - 1] == 0, "the same look again"
        assert flops[k, k] < fresh[k]


def test_reading_in_two_parts_costs_as_much_as_in_one(make_performer):
    shape = make_performer().shape
    head = 2.0 * shape.hidden * shape.vocab
    assert shape.prefill(30) + shape.prefill(50, 30) == pytest.approx(shape.prefill(50) + head)


def test_images_of_another_model_are_fresh_prompts(qwen, image_cases):
    case = image_cases[0]
    reader = Reader(qwen, case, 6)
    for budget in (4, 9, 9):
        prompt = qwen.prompt(case, budget)
        again = budget == 9 and reader._last is not None and reader._last[0].views[0].budget == 9
        answer, other = reader.answer(budget), fresh(qwen, case, budget)
        assert answer.text == other.text and answer.flops == (0 if again else other.flops)
        assert spared(qwen, qwen.prompt(case, 1), prompt) == 0
    assert spared(qwen, qwen.prompt(case, 9), qwen.prompt(case, 9)) == qwen.flops(qwen.prompt(case, 9), 1)


def test_a_slide_with_nothing_more_to_show_is_not_read_again(make_performer, make_bank):
    performer = make_performer()
    performer.bank = make_bank({"small": grid_features(1, 2)})
    case = Case("c", "p", "choice", "Which?", "normal", images=("small",), options=("normal", "tumour"))
    reader = Reader(performer, case, 6)
    first, second = reader.answer(4), reader.answer(16)
    assert second.text == first.text and first.flops > 0 and second.flops == 0
