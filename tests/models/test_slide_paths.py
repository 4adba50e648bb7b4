"""The published paths, put together of compressors: what every one of them must keep."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from frugalpath.errors import InputError
from frugalpath.models.generation import generate
from frugalpath.models.performer import SlidePerformer
from tests.conftest import WIDTH, grid_features
from tests.models.test_generation import greedy

RESAMPLER = {"name": "resampler", "latents": 12, "width": 16, "layers": 1, "heads": 2}
QFORMER = {"name": "qformer", "queries": 8, "width": 16, "layers": 2, "heads": 2, "dropout": 0.0}
PATHS = {
    "pathosynvlm": {"compressors": ["keep"], "aligner": "mlp", "markers": "unique"},
    "shared markers": {"compressors": ["pool"], "markers": "shared"},
    "stm": {"compressors": [{"name": "stm", "threshold": 0.5}]},
    "resampler": {"compressors": [RESAMPLER], "aligner": "mlp"},
    "locpath": {
        "compressors": [{"name": "stm", "most": 30}, RESAMPLER, {"name": "importance", "most": 8, "width": 8}],
        "aligner": "linear",
        "fusion": "cross_attention",
        "cross_layers": [0],
        "markers": "unique",
    },
    "pathalign": {"compressors": [QFORMER], "aligner": "linear"},
}


@pytest.fixture(params=PATHS)
def path(request, make_performer) -> SlidePerformer:
    """A performer of each path, with open gates where it has some."""
    made = make_performer(**PATHS[request.param], aligner_dropout=0.0)
    made.model.eval()
    if made.model.model.routes is not None:
        with torch.no_grad():
            for adapter in made.model.model.routes.adapters:
                adapter.gate.fill_(0.8)
    return made


def logits(performer, prompts) -> torch.Tensor:
    ids = pad_sequence([p.ids for p in prompts], batch_first=True)
    mask = pad_sequence([torch.ones_like(p.ids) for p in prompts], batch_first=True)
    seen = performer.processor.sight.inputs(performer.model, [p.views for p in prompts])
    return performer.model(input_ids=ids, attention_mask=mask, **seen).logits


@torch.no_grad()
def test_a_batch_of_any_budgets_is_as_its_rows_alone(path, cases):
    both = dataclasses.replace(cases[2], images=("field2", "field5"))
    prompts = [path.prompt(cases[0], 4), path.prompt(both, 6), path.prompt(cases[1], 0), path.prompt(cases[3], 1)]
    together = logits(path, prompts)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.allclose(row[: len(prompt)], logits(path, [prompt])[0], atol=1e-5)
    blank = logits(path, [path.prompt(cases[0], 0)])[0, -1]
    assert not torch.allclose(together[0, len(prompts[0]) - 1], blank, atol=1e-4), "what is shown is seen"


def test_realised_tokens_are_those_that_the_language_model_gets(path, cases):
    both = dataclasses.replace(cases[2], images=("field2", "field5"))
    marked = path.config.marker_tokens
    for case, budget in ((cases[0], 1), (cases[0], 4), (both, 6), (cases[0], 100)):
        prompt = path.prompt(case, budget)
        seen = path.processor.sight.inputs(path.model, [prompt.views])
        blocks = path.model.model.visual_tokens(seen["pixel_values"], seen["shown"], seen.get("questions"))
        assert [len(b) for b in blocks] == [v.tokens for v in prompt.views]
        assert prompt.visual - marked * len(blocks) <= budget
        in_text = int((prompt.ids == path.processor.image_token_id).sum())
        assert in_text == (prompt.visual if path.config.in_text else 0)


@torch.no_grad()
def test_generation_and_answers_go_on_from_what_was_seen(path, cases):
    prompts = [path.prompt(c, b) for c, b in zip(cases[:3], (1, 4, 8), strict=True)]
    options = greedy(path)
    options.suppress_tokens = [path.processor.image_token_id]
    written = generate(path.model, path.processor.sight, prompts, [2, 1, 1], options)
    assert written[0] == written[1]
    for prompt, row in zip(prompts, written[1:], strict=True):
        ids = prompt.ids[None]
        seen = path.processor.sight.inputs(path.model, [prompt.views])
        for _ in row:
            scores = path.model(ids, **seen).logits[:, -1:]
            scores[..., path.processor.image_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1)], 1)
        assert row == ids[0, len(prompt) :].tolist()
    answers = path.answer(cases[:2], [4, 8], max_new_tokens=3)
    assert all(a.flops > 0 and a.visual >= 4 for a in answers)
    blank = path.answer(cases[:1], [0], max_new_tokens=3)[0]
    assert blank.visual == 0 and blank.flops < answers[0].flops


@torch.no_grad()
def test_a_saved_path_answers_the_same(path, bank, cases, tmp_path):
    path.save(tmp_path)
    again = SlidePerformer.load(tmp_path, bank, show_options=False)
    again.model.eval()
    prompts = [path.prompt(c, 4) for c in cases[:3]]
    assert torch.equal(logits(again, prompts), logits(path, prompts))
    assert again.config.compressors == path.config.compressors


def test_every_learned_weight_gets_a_gradient(path, cases):
    path.model.train()
    logits(path, [path.prompt(c, 4) for c in cases]).square().mean().backward()
    seeing = {n: p for n, p in path.model.named_parameters() if ".language_model." not in n}
    unused = [n for n, p in seeing.items() if p.grad is None or not p.grad.abs().sum()]
    # A bias before a softmax or a layer norm of equal rows may have none.
    assert len(unused) <= len(seeing) // 6, unused


@torch.no_grad()
def test_the_size_of_the_slide_does_not_show_in_the_tokens(make_performer, make_bank, cases):
    big = make_bank({"field0": grid_features(20, 20, seed=3), "field1": grid_features(5, 5, seed=4)})
    for name in ("resampler", "pathalign", "locpath"):
        made = make_performer(**PATHS[name])
        made.bank = big
        assert made.prompt(cases[0], 6).visual == made.prompt(cases[1], 6).visual


@torch.no_grad()
def test_markers_tell_the_slides_apart(make_performer, cases):
    both = dataclasses.replace(cases[0], images=("field0", "field0"))
    for markers, apart in (("none", False), ("shared", False), ("unique", True)):
        made = make_performer(compressors=["keep"], aligner="mlp", markers=markers)
        made.model.eval()
        seen = made.processor.sight.inputs(made.model, [made.prompt(both, 8).views])
        first, second = made.model.model.visual_tokens(seen["pixel_values"], seen["shown"], None)
        assert torch.equal(first[-4:], second[-4:]) and len(first) == 4 + (markers != "none")
        assert torch.equal(first[0], second[0]) != apart
    looked = make_performer(**{**PATHS["locpath"], "compressors": ["keep"]})
    looked.model.eval()
    seen = looked.processor.sight.inputs(looked.model, [looked.prompt(both, 8).views])
    first, second = looked.model.model.visual_tokens(seen["pixel_values"], seen["shown"], None)
    marks = looked.model.model.markers(torch.tensor([0, 1]))
    assert len(first) == 4, "no token of its own"
    assert torch.allclose(first - marks[0], second - marks[1], atol=1e-5) and not torch.allclose(*marks, atol=0.1)


def test_more_slides_than_markers_are_refused(make_performer, cases):
    made = make_performer(markers="unique", max_slides=2)
    many = dataclasses.replace(cases[0], images=("field0", "field1", "field2"))
    with pytest.raises(InputError, match=r"case0: it has 3 slides, the performer has markers for 2; raise"):
        made.prompt(many, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressors": ["pol"]}, "'pol' is unknown; use one of pool, keep, stm"),
        ({"compressors": []}, "the list is empty"),
        ({"compressors": [{"name": "resampler", "latent": 3}]}, "resampler has no option 'latent'; it has heads"),
        ({"compressors": [RESAMPLER, "pool"]}, "without parameters .* come before the learned ones"),
        ({"aligner": "film"}, "aligner: 'film' is unknown; use one of place, mlp, linear"),
        ({"markers": "each"}, "markers: 'each' is unknown"),
        ({"fusion": "late"}, "fusion: 'late' is unknown"),
        ({"compressors": [None]}, "None is neither a name nor a mapping"),
        ({"compressors": [{**RESAMPLER, "latents": "12"}]}, "resampler: latents '12': must be a number"),
        ({"compressors": [{"name": "keep", "most": 0}]}, "keep: most 0: must be at least 1"),
        ({"fusion": "cross_attention", "cross_layers": []}, "cross_layers: the list is empty"),
        ({"fusion": "cross_attention", "cross_heads": 5}, "cross_heads: 5 heads do not divide a width of 32"),
    ],
)
def test_what_cannot_be_built_is_named(make_performer, changes, message):
    with pytest.raises(InputError, match=message):
        make_performer(**changes)


def test_the_question_decides_what_is_kept(make_performer, cases):
    made = make_performer(**PATHS["locpath"])
    assert made.prompt(cases[0], 4).views[0].question is not None
    other = dataclasses.replace(cases[0], prompt="How many mitoses are there?")
    shown = [made.processor.sight.inputs(made.model, [made.prompt(c, 4).views]) for c in (cases[0], other)]
    kept = [made.model.model.visual_tokens(s["pixel_values"], s["shown"], s["questions"])[0] for s in shown]
    assert not torch.equal(*kept)
    assert made.prompt(cases[0], 100).visual == 8, "8 latents at most"


def test_features_are_standardised_where_they_are_read_and_not_what_is_made_of_them(make_performer):
    as_wide = {**RESAMPLER, "width": WIDTH}
    model = make_performer(compressors=[as_wide], aligner="place").model.model
    assert model.compressor.learned[0].patches.mean.abs().max() > 0.1
    assert not model.aligner.patches.mean.any() and (model.aligner.patches.std == 1).all()
    kept = make_performer(compressors=[{"name": "importance", "most": 4}], aligner="place").model.model
    assert kept.aligner.patches.mean.abs().max() > 0.1, "tokens that are kept are features still"


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_language_model_of_half_precision_is_joined(make_performer, cases, tmp_path, fusion):
    small = make_performer()
    small.model.language_model.bfloat16().save_pretrained(tmp_path)
    small.processor.tokenizer.save_pretrained(tmp_path)
    made = make_performer(
        language_model=str(tmp_path), fusion=fusion, compressors=[RESAMPLER], cross_layers=[0], aligner_dropout=0.0
    )
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert made.answer(cases[:2], [4, 4], max_new_tokens=2)[0].visual == 4


def test_a_small_slide_leaves_its_share_to_the_others(make_performer, make_bank, cases):
    bank = make_bank({"small": grid_features(1, 3), "large": grid_features(8, 8), "other": grid_features(9, 9)})
    three = dataclasses.replace(cases[0], images=("small", "large", "other"))
    made = make_performer(compressors=["keep"], aligner="mlp")
    made.bank = bank
    assert [v.tokens for v in made.see(three, 60)] == [3, 29, 28]
    assert [v.tokens for v in made.see(three, 1000)] == [3, 64, 81]
    latents = make_performer(**PATHS["resampler"])
    latents.bank = bank
    assert [v.tokens for v in latents.see(three, 30)] == [10, 10, 10]
    assert [v.tokens for v in latents.see(three, 100)] == [12, 12, 12], "it has 12 latents"
