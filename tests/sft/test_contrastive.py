from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from frugalpath.errors import InputError
from frugalpath.models.compressors.base import Tokens
from frugalpath.models.slide_text import similarity, text_batch
from frugalpath.models.tokenizer import train_tokenizer
from frugalpath.sft.contrastive import PairCollator, build_model, contrastive_config, train_contrastive

KINDS = ("normal", "adenoma", "carcinoma")
SIDES = ("left", "right")
SHAPE = {
    "queries": 4,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "dropout": 0.0,
    "text_length": 16,
    "shared_width": 16,
}
OPTIONS = {"per_device_train_batch_size": 24, "learning_rate": 1.5e-3, "logging_steps": 5, "save_steps": 1000}


def pairs(count: int, seed: int) -> tuple[list[torch.Tensor], list[str]]:
    """Slides of 10 to 20 patches, a third of which say what lies on which side, and their texts."""
    draw = torch.Generator().manual_seed(seed)
    slides, texts = [], []
    for i in range(count):
        kind, side = i % 3, i // 3 % 2
        n = int(torch.randint(10, 21, (1,), generator=draw))
        features, place = torch.randn(n, 8, generator=draw), torch.rand(n, 3, generator=draw)
        features[: n // 3, kind] += 4
        place[: n // 3, 0] = 0.1 + 0.8 * side
        slides.append(torch.cat([features, place, torch.ones(n, 1)], 1))
        texts.append(f"{KINDS[kind]} on the {SIDES[side]}")
    return slides, texts


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(pairs(6, 0)[1], 300)


@torch.no_grad()
def first_hits(model, tokenizer, slides, texts) -> tuple[float, float]:
    """Share of slides whose best text, and of texts whose best slide, is right."""
    model.eval()
    scores = similarity(
        model.embed_slides(Tokens.from_rows(slides)), model.embed_texts(**text_batch(tokenizer, texts, 16))
    )
    by_slide = [texts[j] == text for j, text in zip(scores.argmax(1).tolist(), texts, strict=True)]
    by_text = [texts[i] == text for i, text in zip(scores.argmax(0).tolist(), texts, strict=True)]
    return sum(by_slide) / len(texts), sum(by_text) / len(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("losses", "steps"), [(["itc"], 320), (["itc", "itm", "itg"], 200)])
def test_retrieval_is_learned_and_holds_for_new_slides(tokenizer, tmp_path, losses, steps):
    slides, texts = pairs(192, 1)
    model = build_model(slides, tokenizer, SHAPE | {"losses": losses})
    args = contrastive_config(tmp_path, OPTIONS | {"max_steps": steps}, 0)
    trainer = train_contrastive(model, slides, texts, tokenizer, args)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == steps // 5
    for row in logged:
        assert set(row) & {"itc", "itm", "itg"} == set(losses)
        assert row["loss"] == pytest.approx(sum(row[name] for name in losses), abs=1e-3)
    new = pairs(48, 2)
    assert min(first_hits(model, tokenizer, *new)) >= 0.8
    assert model.qformer.embed.mean.abs().max() > 0.1, "features are standardised"


def test_batches_are_padded_and_kept_together(tokenizer):
    slides, texts = pairs(6, 0)
    batch = PairCollator(slides, texts, tokenizer, 16)([{"index": 4}, {"index": 1}])
    assert torch.equal(batch["features"][1, : len(slides[1])], slides[1][:, :8])
    assert batch["size"].sum(1).tolist() == [len(slides[4]), len(slides[1])]
    words = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
    assert words == [texts[4], texts[1]]


def test_some_patches_are_drawn_anew_for_each_batch(tokenizer):
    slides, texts = pairs(6, 0)
    collator = PairCollator(slides, texts, tokenizer, 16, patches=12)
    first, again = (collator([{"index": 4}, {"index": 1}]) for _ in range(2))
    assert torch.equal(first["features"], again["features"]), "a resumed run sees the same"
    assert first["size"].sum(1).tolist() == [min(12, len(slides[i])) for i in (4, 1)]
    large = max(range(6), key=lambda i: len(slides[i]))
    drawn = [collator([{"index": large}, {"index": i}])["features"][0] for i in range(3)]
    own = {tuple(row.tolist()) for row in slides[large][:, :8]}
    for features in drawn:
        assert len(own & {tuple(row.tolist()) for row in features}) == 12
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.slow
def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tokenizer, tmp_path, two_threads):
    """To the bit, although the gradients of rows that are picked by number are summed by two threads."""
    slides, texts = pairs(48, 1)
    weights = []
    for stop in (False, True):
        folder = tmp_path / str(stop)
        args = contrastive_config(folder, OPTIONS | {"max_steps": 6, "save_steps": 3}, 0)
        model = build_model(slides, tokenizer, SHAPE | {"dropout": 0.1})
        if stop:
            train_contrastive(model, slides, texts, tokenizer, args, callbacks=[StopAt(3)])
            assert [p.name for p in Path(folder).glob("checkpoint-*")] == ["checkpoint-3"]
            model = build_model(slides, tokenizer, SHAPE | {"dropout": 0.1}, seed=9)
        train_contrastive(model, slides, texts, tokenizer, args, resume=str(folder / "checkpoint-3") if stop else None)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **options):
        control.should_training_stop = state.global_step == self.step


def test_what_cannot_be_trained_is_refused_with_all_reasons(tokenizer, tmp_path):
    slides, texts = pairs(6, 0)
    model = build_model(slides, tokenizer, SHAPE)
    args = contrastive_config(tmp_path, OPTIONS | {"max_steps": 1}, 0)
    larger = train_tokenizer(["of other words entirely, and many more of them than those have"], 320)
    assert len(larger) > len(tokenizer)
    with pytest.raises(InputError) as error:
        train_contrastive(model, slides[:1], ["", *texts[1:3]], larger, args)
    told = str(error.value)
    for part in ("1 slides and 3 texts", "fewer than two pairs", "1 texts are empty", "use the tokenizer"):
        assert part in told


def test_a_key_that_is_not_known_is_named(tokenizer):
    with pytest.raises(InputError, match=r"unknown key querys; use one of .*queries"):
        build_model(pairs(6, 0)[0], tokenizer, {"querys": 4})
    with pytest.raises(InputError, match="no slide"):
        build_model([], tokenizer, SHAPE)
