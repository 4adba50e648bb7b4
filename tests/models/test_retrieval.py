from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from frugalpath.errors import InputError
from frugalpath.models.retrieval import Embedder, Item, RetrievalIndex, class_probabilities, class_vectors, slide_rows
from frugalpath.models.slide_text import SlideTextConfig, SlideTextModel, similarity
from frugalpath.models.tokenizer import train_tokenizer
from tests.conftest import WIDTH, grid_features

TEXTS = ["adenoma of the colon", "carcinoma, grade 2", "normal colon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    shape = {"queries": 3, "width": 16, "layers": 2, "heads": 2, "text_length": 16, "shared_width": 8}
    config = SlideTextConfig(feature_dim=WIDTH, vocab_size=len(tokenizer), losses=["itc"], **shape)
    SlideTextModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def embedder(folder) -> Embedder:
    return Embedder.load(folder)


def rows(count: int = 5) -> list[torch.Tensor]:
    return [slide_rows(grid_features(2 + i, 3, float(i), seed=i)) for i in range(count)]


def items() -> list[Item]:
    """Two slides share a text; one has none."""
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], None, TEXTS[2]]
    return [Item(f"slide{i}", f"patient{i // 2}", text) for i, text in enumerate(texts)]


@pytest.fixture
def index(embedder) -> RetrievalIndex:
    return RetrievalIndex.build(embedder, items(), rows(), "an-encoder")


def test_rows_of_a_slide_are_features_places_and_sizes():
    stored = grid_features(2, 4)
    found = slide_rows(stored)
    assert found.shape == (8, WIDTH + 4) and found.dtype == torch.float32
    np.testing.assert_array_equal(found[:, :WIDTH], stored.features)
    np.testing.assert_allclose(found[0, WIDTH:], [1 / 8, 1 / 4, 1 / 4, 1])
    np.testing.assert_allclose(found[-1, WIDTH:], [7 / 8, 3 / 4, 1 / 4, 1])


def test_batches_do_not_change_what_a_slide_embeds_to(embedder):
    whole = embedder.slides(rows())
    assert whole.shape == (5, 3, 8)
    torch.testing.assert_close(embedder.slides(rows(), batch_size=2), whole)
    torch.testing.assert_close(embedder.texts(TEXTS, batch_size=2), embedder.texts(TEXTS))


def test_a_text_finds_slides_in_the_order_of_their_similarity(index):
    found = index.query_text(TEXTS[1], k=4)
    scores = similarity(index.slide_vectors, index.embedder.texts([TEXTS[1]]))[:, 0]
    order = scores.argsort(descending=True)[:4].tolist()
    assert [hit["id"] for hit in found] == [f"slide{i}" for i in order]
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4]
    assert [hit["score"] for hit in found] == pytest.approx(scores[order].tolist())
    assert found[0].keys() == {"rank", "score", "id", "patient", "text"}
    assert len(index.query_text("any words at all", k=99)) == 5


def test_a_slide_finds_each_text_once_with_its_slides(index):
    found = index.query_slide(rows()[2], k=9)
    assert sorted(hit["text"] for hit in found) == sorted(TEXTS)
    by_text = {hit["text"]: hit["ids"] for hit in found}
    assert by_text[TEXTS[0]] == ["slide0", "slide2"] and by_text[TEXTS[2]] == ["slide4"]
    scores = [hit["score"] for hit in found]
    assert scores == sorted(scores, reverse=True)


def test_pairs_are_the_slides_that_have_a_text(index):
    scores, having = index.pairs()
    assert [item.id for item in having] == ["slide0", "slide1", "slide2", "slide4"]
    np.testing.assert_array_equal(scores[:, 0], scores[:, 2])
    own = [
        float(similarity(index.slide_vectors[[i]], index.embedder.texts([t])))
        for i, t in ((1, TEXTS[1]), (4, TEXTS[2]))
    ]
    assert [scores[1, 1], scores[3, 3]] == pytest.approx(own, abs=1e-6)


def test_a_saved_index_answers_alike(index, tmp_path):
    index.save(tmp_path / "index")
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["index.json", "vectors.safetensors"]
    again = RetrievalIndex.load(tmp_path / "index")
    assert again.items == index.items and again.encoder == "an-encoder"
    assert again.query_text(TEXTS[1]) == index.query_text(TEXTS[1])
    assert again.query_slide(rows()[0]) == index.query_slide(rows()[0])


def test_an_index_of_another_model_is_refused(index, embedder, tmp_path):
    index.save(tmp_path / "index")
    torch.manual_seed(1)
    other = SlideTextModel(embedder.model.config)
    other.save_pretrained(tmp_path / "other")
    embedder.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="build the index again"):
        RetrievalIndex.load(tmp_path / "index", tmp_path / "other")


def test_a_damaged_index_is_named(index, tmp_path):
    with pytest.raises(InputError, match=r"index\.json: no such file"):
        RetrievalIndex.load(tmp_path)
    index.save(tmp_path)
    known = json.loads((tmp_path / "index.json").read_text())
    known["items"].pop()
    (tmp_path / "index.json").write_text(json.dumps(known))
    with pytest.raises(InputError, match=r"does not belong to this index\.json"):
        RetrievalIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        RetrievalIndex.load(tmp_path)


def test_what_cannot_be_indexed_is_refused(embedder, index):
    with pytest.raises(InputError, match="'slide0' occurs more than once"):
        RetrievalIndex.build(embedder, items()[:1] * 2, rows(2))
    with pytest.raises(InputError, match="no slide"):
        RetrievalIndex.build(embedder, [], [])
    with pytest.raises(InputError, match="width 5, the model reads 8"):
        embedder.slides([torch.ones(3, 9)])
    with pytest.raises(InputError, match=r"slide 1 .*no patches"):
        embedder.slides([rows()[0], torch.ones(0, WIDTH + 4)])
    with pytest.raises(InputError, match="at least 1"):
        index.query_text("colon", k=0)
    bare = RetrievalIndex.build(embedder, [Item("a", "p")], rows(1))
    with pytest.raises(InputError, match="none of its slides has a text"):
        bare.query_slide(rows()[0])
    assert bare.query_text("colon")[0]["id"] == "a"


def test_a_folder_of_another_model_is_refused(make_performer, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        Embedder.load(tmp_path)
    make_performer().save(tmp_path)
    with pytest.raises(InputError, match="of the kind slide_vlm"):
        Embedder.load(tmp_path)


def test_a_class_is_the_normalised_mean_of_its_prompts(embedder):
    prompts = {"normal": ["normal colon", "no lesion"], "tumour": ["carcinoma"]}
    classes = class_vectors(embedder, prompts)
    mean = embedder.texts(prompts["normal"]).mean(0)
    torch.testing.assert_close(classes[0], mean / mean.norm())
    torch.testing.assert_close(classes[1], embedder.texts(["carcinoma"])[0])
    slides = embedder.slides(rows())
    found = class_probabilities(embedder, slides, classes)
    torch.testing.assert_close(found.sum(1), torch.ones(5))
    assert torch.equal(found.argmax(1), similarity(slides, classes).argmax(1))


@pytest.mark.parametrize(
    "prompts", [{"a": ["x"]}, {"a": ["x"], "b": []}, {"a": "x", "b": ["y"]}, {"a": [" "], "b": ["y"]}]
)
def test_prompts_that_say_nothing_are_refused(embedder, prompts):
    with pytest.raises(InputError, match="prompts:"):
        class_vectors(embedder, prompts)
