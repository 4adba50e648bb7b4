from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModel, PreTrainedTokenizerFast

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import PatchEmbedding, Tokens
from frugalpath.models.compressors.qformer import QFormer
from frugalpath.models.slide_text import (
    SlideTextConfig,
    SlideTextModel,
    copy_qformer,
    hard_negatives,
    sight,
    similarity,
    text_batch,
)
from frugalpath.models.tokenizer import train_tokenizer

TEXTS = ["adenoma of the colon", "carcinoma, grade 2", "normal colon", "carcinoma, grade 3, with necrosis"]
SHAPE = {"feature_dim": 8, "queries": 3, "width": 16, "layers": 2, "heads": 2, "text_length": 12, "shared_width": 8}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def make(tokenizer, **changes) -> SlideTextModel:
    torch.manual_seed(0)
    return SlideTextModel(SlideTextConfig(vocab_size=len(tokenizer), **{**SHAPE, **changes})).eval()


@pytest.fixture
def model(tokenizer) -> SlideTextModel:
    return make(tokenizer)


def slides(count: int, dim: int = 8) -> Tokens:
    """Slides of 4, 5, 6 ... patches."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.rand(4 + i, dim + 4, generator=draw) for i in range(count)]
    return Tokens.from_rows([torch.cat([r[:, :-1], torch.ones(len(r), 1)], 1) for r in rows])


def batch(tokenizer, texts=TEXTS) -> dict[str, torch.Tensor]:
    tokens = slides(len(texts))
    return {"features": tokens.features, "place": tokens.place, "size": tokens.size} | text_batch(tokenizer, texts, 12)


@pytest.mark.parametrize("loss", ["itc", "itm", "itg"])
def test_a_token_depends_on_those_it_may_see_and_no_others(model, loss):
    q, t = 3, 5
    words = torch.tensor([[1, 1, 1, 1, 0]])  # the last is padding
    text = torch.randn(1, t, 16, requires_grad=True)
    tokens = slides(1)
    mask = torch.zeros(1, 1, q + t, q + t).masked_fill(~sight(loss, q, words), torch.finfo(torch.float32).min)
    out = model.qformer.read(*model.qformer.see(tokens), q, text, mask)[0]
    depends = torch.zeros(q + t, q + t, dtype=torch.bool)
    for i in range(q + t):
        weights = torch.randn(16)  # a plain sum would be constant behind a layer norm
        queries, words_grad = torch.autograd.grad(out[i] @ weights, [model.qformer.queries, text], retain_graph=True)
        depends[i] = torch.cat([queries, words_grad[0]]).abs().amax(1) > 0
    text_at, padding = range(q, q + t), q + t - 1

    def may_see(i: int, j: int) -> bool:
        if i == j:
            return True
        if j == padding:
            return False
        if loss == "itm":
            return True
        if (i in text_at) != (j in text_at):
            return loss == "itg" and i in text_at
        return loss == "itc" or i not in text_at or j < i

    for i in range(q + t):
        for j in range(q + t):
            assert bool(depends[i, j]) == may_see(i, j), (i, j)


def test_only_queries_look_at_the_patches_themselves(model):
    tokens = slides(1)
    features = tokens.features.requires_grad_()
    text = torch.randn(1, 2, 16)
    for loss, sees in (("itc", False), ("itm", True), ("itg", True)):
        mask = torch.zeros(1, 1, 5, 5).masked_fill(~sight(loss, 3, torch.ones(1, 2)), torch.finfo(torch.float32).min)
        out = model.qformer.read(*model.qformer.see(tokens), 3, text, mask)[0]
        (grad,) = torch.autograd.grad(out[3] @ torch.randn(16), features, allow_unused=True)
        assert bool(grad.any()) == sees, loss


@torch.no_grad()
def test_slides_and_texts_embed_together_as_they_do_alone(model, tokenizer):
    inputs = batch(tokenizer)
    text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    tokens = Tokens(inputs["features"], inputs["place"], inputs["size"])
    seen, texts = model._compared(
        *model.qformer.see(tokens), **{"ids": text["input_ids"], "mask": text["attention_mask"]}
    )
    torch.testing.assert_close(model.embed_slides(tokens), seen)
    torch.testing.assert_close(model.embed_texts(**text), texts)
    assert seen.shape == (4, 3, 8) and texts.shape == (4, 8)
    torch.testing.assert_close(seen.norm(dim=-1), torch.ones(4, 3))
    assert model.embed_slides(tokens, budget=2).shape == (4, 2, 8)


@torch.no_grad()
def test_padding_of_a_text_does_not_matter(model, tokenizer):
    short, long = text_batch(tokenizer, TEXTS[:1], 12), text_batch(tokenizer, TEXTS, 12)
    assert short["input_ids"].shape[1] < long["input_ids"].shape[1]
    torch.testing.assert_close(model.embed_texts(**short), model.embed_texts(**long)[:1])


@torch.no_grad()
def test_similarity_is_the_best_query_s_cosine():
    a, b = F.normalize(torch.randn(2, 3, 4), dim=-1), F.normalize(torch.randn(5, 4), dim=-1)
    want = [[max(float(z @ t) for z in slide) for t in b] for slide in a]
    torch.testing.assert_close(similarity(a, b), torch.tensor(want))


@torch.no_grad()
def test_the_contrastive_loss_shares_the_match_among_equal_texts(model, tokenizer):
    inputs = batch(tokenizer, [TEXTS[0], TEXTS[1], TEXTS[0]])
    tokens = Tokens(inputs["features"], inputs["place"], inputs["size"])
    scores = model.scale * similarity(
        model.embed_slides(tokens), model.embed_texts(inputs["input_ids"], inputs["attention_mask"])
    )
    match = {0: (0, 2), 1: (1,), 2: (0, 2)}
    want = [
        -sum(float(s.log_softmax(1)[i, j]) / len(js) for i, js in match.items() for j in js) / 3
        for s in (scores, scores.T)
    ]
    out = model(**inputs, losses=["itc"])
    assert float(out.loss) == float(out.itc) == pytest.approx(sum(want) / 2, rel=1e-5)
    assert out.itm is None and out.itg is None


def test_hard_negatives_are_similar_and_never_of_an_equal_text():
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    scores = torch.zeros(4, 4)
    scores[2, 3] = 4.0
    drawn = []
    for _ in range(300):
        own, texts, negatives = hard_negatives(scores, same)
        assert own.tolist() == [0, 1, 2, 3]
        assert not same[own, texts].any() and not same[own, negatives].any()
        drawn.append((int(texts[2]), int(negatives[3])))
    # Slide 2 and text 3 are alike: e^4 / (e^4 + 2) = 0.96 of the draws.
    assert sum(t == 3 for t, _ in drawn) > 270 and sum(s == 2 for _, s in drawn) > 270


def test_pairs_without_a_negative_have_none():
    own, texts, negatives = hard_negatives(torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool))
    assert len(own) == len(texts) == len(negatives) == 0


def test_a_batch_of_one_text_still_trains(model, tokenizer):
    out = model(**batch(tokenizer, TEXTS[:1] * 3))
    out.loss.backward()
    assert out.loss.isfinite()
    assert float(out.itc.detach()) > math.log(3) - 1e-5, "there is nothing to tell apart"
    torch.testing.assert_close(out.loss, out.itc + out.itm + out.itg)


@torch.no_grad()
def test_a_word_is_written_from_the_slide_and_the_words_before_it(model, tokenizer):
    logits = []
    model.itg_head.register_forward_hook(lambda module, inputs, out: logits.append(out))
    inputs = batch(tokenizer, TEXTS[1:2])
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 3] = 5
    for each in (inputs, other, {**inputs, "features": -inputs["features"]}):
        model(**each, losses=["itg"])
    same = (logits[0] == logits[1]).all(-1)[0].tolist()
    assert same == [True] * 4 + [False] * (len(same) - 4) and len(same) == inputs["input_ids"].shape[1]
    assert not (logits[0] == logits[2]).all(-1).any()


@pytest.mark.slow
def test_all_three_losses_are_learned(tokenizer):
    model = make(tokenizer, dropout=0.0)
    inputs = batch(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = {k: float(v.detach()) for k, v in model(**inputs).items()}
    for _ in range(180):
        optimizer.zero_grad()
        out = model(**inputs)
        out.loss.backward()
        optimizer.step()
    for name in ("itc", "itm", "itg"):
        assert out[name].item() < 0.3 * first[name], (name, first[name], out[name].item())


def test_the_r_variant_is_contrastive_alone(tokenizer):
    model = make(tokenizer, losses=["itc"])
    assert not hasattr(model, "itm_head") and not hasattr(model, "itg_head")
    out = model(**batch(tokenizer))
    out.loss.backward()
    assert list(out) == ["loss", "itc"]
    still = [k for k, p in model.named_parameters() if p.grad is None]
    assert not still, "several processes wait for the gradient of every parameter"


@torch.no_grad()
def test_a_saved_model_gives_equal_results(model, tokenizer, tmp_path):
    model.qformer.embed.standardise(torch.randn(50, 8) * 3 + 1)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, SlideTextModel)
    inputs = batch(tokenizer)
    for loss in ("itc", "itg"):
        assert torch.equal(again(**inputs, losses=[loss]).loss, model(**inputs, losses=[loss]).loss)


def test_initial_values_are_set_by_the_model(tokenizer, tmp_path):
    model = make(tokenizer)
    assert float(model.scale) == pytest.approx(1 / 0.07)
    torch.testing.assert_close(model.qformer.queries.std(), torch.tensor(0.02), rtol=0.3, atol=0)
    (embed,) = [m for m in model.modules() if isinstance(m, PatchEmbedding)]
    assert 0.15 < float(embed.place.weight.std()) < 0.25
    # A folder without the queries, as of an older model: they are drawn and not left as memory was.
    state = {k: v for k, v in model.state_dict().items() if k not in ("qformer.queries", "log_scale")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = SlideTextModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.qformer.queries.std(), torch.tensor(0.02), rtol=0.3, atol=0)
    assert float(again.scale.detach()) == pytest.approx(1 / 0.07)
    assert torch.equal(again.embeddings.position_ids, model.embeddings.position_ids)


def test_the_temperature_is_learned_within_a_bound(model, tokenizer):
    model(**batch(tokenizer), losses=["itc"]).loss.backward()
    assert model.log_scale.grad != 0
    with torch.no_grad():
        model.log_scale.fill_(20.0)
    assert float(model.scale) == 100


@torch.no_grad()
def test_a_compressor_takes_the_trained_weights(model):
    model.qformer.embed.standardise(torch.randn(50, 8) * 3 + 1)
    target = QFormer(8, queries=3, width=16, layers=2, heads=2).eval()
    copy_qformer(model.qformer, target)
    tokens = slides(3)
    for budget in (1, 3):
        assert torch.equal(target(tokens, budget).features, model.qformer(tokens, budget).features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 4}, r"queries: \(3, 16\) trained, \(4, 16\) wanted"),
        ({"layers": 3}, "num_hidden_layers: 2 trained, 3 wanted"),
        ({"layers": 1}, "num_hidden_layers: 2 trained, 1 wanted"),
        ({"heads": 4}, "num_attention_heads: 2 trained, 4 wanted"),
        ({"dim": 5}, r"embed.mean: \(8,\) trained, \(5,\) wanted"),
    ],
)
def test_weights_of_another_shape_are_refused(model, changes, message):
    target = QFormer(**{"dim": 8, "queries": 3, "width": 16, "layers": 2, "heads": 2, **changes})
    with pytest.raises(InputError, match=message):
        copy_qformer(model.qformer, target)


def test_a_text_is_cut_and_closed(tokenizer):
    out = text_batch(tokenizer, ["normal", "normal " * 40], 12)
    assert out["input_ids"].shape == (2, 12)
    ends = out["attention_mask"].sum(1) - 1
    assert ends[1] == 11
    assert (out["input_ids"].gather(1, ends[:, None]) == tokenizer.eos_token_id).all()
    assert tokenizer.decode(out["input_ids"][0], skip_special_tokens=True) == "normal"


def test_texts_that_cannot_be_compared_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"text 1 .* is empty"):
        text_batch(tokenizer, ["a", " "], 12)
    with pytest.raises(InputError, match="neither eos_token nor sep_token"):
        text_batch(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())), ["a"], 12)


@pytest.mark.parametrize("losses", [[], ["itc", "mlm"]])
def test_an_unknown_loss_is_refused(losses):
    with pytest.raises(InputError, match="one or more of itc, itm, itg"):
        SlideTextConfig(losses=losses)


def test_gradient_checkpointing_changes_no_gradient(tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = make(tokenizer, dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        torch.manual_seed(1)  # of the negatives
        model(**batch(tokenizer)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_half_precision_gives_nearly_the_same_losses(model, tokenizer, whole):
    inputs = batch(tokenizer)
    torch.manual_seed(1)
    want = model(**inputs)
    torch.manual_seed(1)
    if whole:
        got = model.to(torch.bfloat16)(**inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = model(**inputs)
    for name in ("itc", "itm", "itg"):
        assert got[name].item() == pytest.approx(want[name].item(), rel=0.05)
