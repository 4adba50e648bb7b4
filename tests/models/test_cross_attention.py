from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from frugalpath.errors import InputError
from frugalpath.models.build import PerformerConfig, lora_config
from frugalpath.models.cross_attention import Routes, attach, decoder_layers, spread
from frugalpath.models.generation import generate
from tests.models.test_generation import greedy

HIDDEN = 32


@pytest.fixture
def routed(make_performer):
    """A performer of two layers, the second of which looks at the visual tokens, with open gates."""
    made = make_performer(fusion="cross_attention", cross_layers=[1], layers=2, aligner_dropout=0.0)
    made.model.eval()
    with torch.no_grad():
        made.model.model.routes.adapters[0].gate.fill_(0.7)
    return made


def forward(performer, cases, budget, model=None):
    prompts = [performer.prompt(c, budget) for c in cases]
    ids = torch.nn.utils.rnn.pad_sequence([p.ids for p in prompts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p.ids) for p in prompts], batch_first=True)
    model = model if model is not None else performer.model
    seen = performer.processor.sight.inputs(model, [p.views for p in prompts])
    return model(input_ids=ids, attention_mask=mask, **seen)


@torch.no_grad()
def test_the_model_begins_as_the_text_model(make_performer, cases):
    made = make_performer(fusion="cross_attention", cross_layers=[0], aligner_dropout=0.0)
    made.model.eval()
    seen, blank = (forward(made, cases[:3], b) for b in (16, 0))
    assert seen.visual_memory is not None and blank.visual_memory is None
    assert torch.equal(seen.logits, blank.logits), "bit for bit"


@torch.no_grad()
def test_an_open_gate_lets_the_slide_be_seen_and_the_text_stays_as_long(routed, cases):
    seen, blank = (forward(routed, cases[:3], b).logits for b in (16, 0))
    assert seen.shape == blank.shape
    assert not torch.allclose(seen, blank, atol=1e-3)
    alone = forward(routed, cases[:1], 16).logits
    assert torch.allclose(seen[0, : alone.shape[1]], alone[0], atol=1e-5), "rows look at their own slide"
    prompt = routed.prompt(cases[0], 16)
    assert (prompt.visual, prompt.text, len(prompt)) == (16, len(prompt), len(routed.prompt(cases[0], 0)))


@torch.no_grad()
def test_rows_without_an_image_stand_beside_others(routed, cases):
    blank = dataclasses.replace(cases[1], images=())
    both = forward(routed, [cases[0], blank], 4).logits
    alone = forward(routed, [cases[0]], 4).logits
    assert torch.allclose(both[0, : alone.shape[1]], alone[0], atol=1e-5)
    assert both.isfinite().all()


@torch.no_grad()
def test_generation_looks_at_every_token(routed, cases):
    prompts = [routed.prompt(c, 16) for c in cases[:3]]
    written = generate(routed.model, routed.processor.sight, prompts, [2, 1, 1], greedy(routed))
    for prompt, rows in zip(prompts, (written[:2], written[2:3], written[3:]), strict=True):
        ids = prompt.ids[None]
        seen = routed.processor.sight.inputs(routed.model, [prompt.views])
        for _ in range(len(rows[0])):
            ids = torch.cat([ids, routed.model(ids, **seen).logits[:, -1:].argmax(-1)], 1)
        assert all(row == ids[0, len(prompt) :].tolist() for row in rows)
        stock = routed.model.generate(prompt.ids[None], **seen, max_new_tokens=len(rows[0]), do_sample=False)
        assert stock.tolist() == ids.tolist()


def test_a_copy_has_adapters_of_its_own(routed, cases):
    twin = copy.deepcopy(routed.model)
    with torch.no_grad():
        before = forward(routed, cases[:2], 4).logits
        twin.model.routes.adapters[0].gate.zero_()
        assert torch.equal(forward(routed, cases[:2], 4).logits, before)
        closed = forward(routed, cases[:2], 4, twin).logits
        assert torch.equal(closed, forward(routed, cases[:2], 0, twin).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_low_rank_adapters_train_the_routes_as_well(routed, cases, checkpointing):
    config = lora_config(PerformerConfig(lora={"r": 2}), routed.model)
    assert config is not None and set(config.modules_to_save) == {"aligner", "routes"}
    adapted = get_peft_model(routed.model, config)
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    forward(routed, cases[:2], 4, adapted).logits.square().mean().backward()
    grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    trained = [n for n in grads if "routes" in n or "aligner" in n]
    assert trained and all(grads[n] is not None and grads[n].abs().sum() > 0 for n in trained if "default" in n)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "routes.modules_to_save" in name and "gate" in name:
                parameter.zero_()
    adapted.eval()
    with torch.no_grad():
        closed, blank = (forward(routed, cases[:2], b, adapted).logits for b in (4, 0))
    assert torch.equal(closed, blank), "the trained copy is what is used"


def test_gradient_checkpointing_changes_no_gradient(make_performer, cases):
    grads = []
    for checkpointing in (False, True):
        made = make_performer(fusion="cross_attention", cross_layers=[0, 1], layers=2, aligner_dropout=0.0)
        with torch.no_grad():
            for adapter in made.model.model.routes.adapters:
                adapter.gate.fill_(0.3)
        made.model.train()
        if checkpointing:
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        forward(made, cases[:3], 4).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in made.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("routes" in n for n in grads[0])
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-7) for n in grads[0])


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(routed, bank, cases, tmp_path):
    routed.save(tmp_path)
    again = type(routed).load(tmp_path, bank, show_options=False)
    again.model.eval()
    assert torch.equal(forward(again, cases[:2], 4).logits, forward(routed, cases[:2], 4).logits)
    assert float(again.model.model.routes.adapters[0].gate) == pytest.approx(0.7)


SHAPE = {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 2}
FAMILIES = {
    "qwen2": {"intermediate_size": 32, "num_key_value_heads": 1},
    "llama": {"intermediate_size": 32, "num_key_value_heads": 1},
    "gemma3_text": {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"intermediate_size": 32, "num_key_value_heads": 1, "pad_token_id": 0},
    "gpt2": {},
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_model_takes_the_adapter(family):
    model = AutoModel.from_config(AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])).eval()
    owner = torch.nn.Module()
    owner.routes = Routes(HIDDEN, [1, 3], 2)
    ids = torch.arange(6)[None] + 5
    before = model(input_ids=ids).last_hidden_state
    attach(owner, model)
    memory = owner.routes.remember(torch.randn(1, 7, HIDDEN), torch.tensor([7]))
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)
    assert torch.equal(model(input_ids=ids, visual_memory=memory).last_hidden_state, before)
    for adapter in owner.routes.adapters:
        adapter.gate.fill_(1.0)
    assert not torch.allclose(model(input_ids=ids, visual_memory=memory).last_hidden_state, before, atol=1e-3)


def test_layers_that_are_not_there_are_named(make_performer):
    with pytest.raises(InputError, match=r"cross_layers: \[5\] are not layers of a model that has 0 to 1"):
        make_performer(fusion="cross_attention", cross_layers=[1, 5], layers=2)
    assert spread(28) == [7, 14, 21] and spread(1) == [0] and spread(4) == [1, 2, 3]


def test_padding_of_the_memory_is_not_seen():
    routes = Routes(HIDDEN, [0], 2)
    with torch.no_grad():
        routes.adapters[0].gate.fill_(1.0)
    tokens = torch.randn(2, 5, HIDDEN)
    hidden = torch.randn(2, 3, HIDDEN)
    short = routes(0, hidden, routes.remember(tokens, torch.tensor([5, 2])))
    tokens[1, 2:] = 100.0
    again = routes(0, hidden, routes.remember(tokens, torch.tensor([5, 2])))
    assert torch.equal(short[1], again[1])
    assert torch.allclose(
        short[1:], routes(0, hidden[1:], routes.remember(tokens[1:, :2], torch.tensor([2]))), atol=1e-6
    )


def test_flops_are_those_that_torch_counts():
    routes = Routes(HIDDEN, [0, 1], 2)
    tokens, hidden = torch.randn(1, 9, HIDDEN), torch.randn(1, 6, HIDDEN)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no other
        memory = routes.remember(tokens, torch.tensor([9]))
        for at in (0, 1):
            routes(at, hidden, memory)
    assert routes.flops(6, 9) == counter.get_total_flops()
    assert len(decoder_layers(AutoModel.from_config(AutoConfig.for_model("qwen2", **SHAPE)))) == 4
