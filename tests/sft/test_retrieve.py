from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from frugalpath.errors import InputError
from frugalpath.models.slide_text import SlideTextConfig, SlideTextModel
from frugalpath.models.tokenizer import train_tokenizer
from frugalpath.sft import retrieve
from frugalpath.sft.pairs import FeatureFiles, from_manifest, from_recipe, recipe_labels
from frugalpath.slides.store import write_features
from tests.conftest import WIDTH, grid_features

TEXTS = ["adenoma of the colon", "carcinoma, grade 2", "normal colon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, six slides, their manifest, prompts and labels."""
    root = tmp_path_factory.mktemp("retrieval")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(TEXTS, 300)
    shape = {"queries": 3, "width": 16, "layers": 2, "heads": 2, "text_length": 16, "shared_width": 8}
    SlideTextModel(
        SlideTextConfig(feature_dim=WIDTH, vocab_size=len(tokenizer), losses=["itc"], **shape)
    ).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows, labels = ["slide,text,patient"], ["id,label"]
    for i in range(6):
        write(root / "slides" / f"s{i}.h5", i)
        rows.append(f'slides/s{i}.h5,"{TEXTS[i % 3] if i else ""}",p{i // 2}')
        labels.append(f"s{i},{('adenoma', 'carcinoma', 'normal')[i % 3]}")
    (root / "pairs.csv").write_text("\n".join(rows))
    (root / "labels.csv").write_text("\n".join(labels))
    prompts = {"normal": ["normal colon", "no lesion"], "adenoma": ["adenoma"], "carcinoma": ["carcinoma"]}
    (root / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    return root


def write(path, seed: int, encoder: str = "one") -> None:
    stored = grid_features(3, 4, float(seed % 3), seed=seed)
    stored.attrs["encoder"] = encoder
    write_features(path, stored)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the entry and gives the JSON that it prints."""

    def call(*argv: object):
        monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, argv)])
        retrieve.main()
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def index(folder, run):
    built = run("build", "--model", folder / "model", "--manifest", folder / "pairs.csv", "--index", folder / "index")
    assert built == {"index": str(folder / "index"), "slides": 6, "distinct_texts": 3, "encoder": "one"}
    return folder / "index"


def test_an_index_is_built_queried_and_measured(folder, index, run):
    found = run("query", "--index", index, "--text", "carcinoma, grade 2", "-k", 3)
    assert [hit["rank"] for hit in found] == [1, 2, 3]
    assert {hit["id"] for hit in found} <= {f"s{i}" for i in range(6)}
    found = run("query", "--index", index, "--slide", folder / "slides" / "s4.h5")
    assert sorted(hit["text"] for hit in found) == sorted(TEXTS)
    assert {hit["text"]: hit["ids"] for hit in found}[TEXTS[0]] == ["s3"]
    found = run("evaluate", "--index", index, "--resamples", 50)
    assert (found["retrieval"]["pairs"], found["retrieval"]["distinct_texts"]) == (5, 3)
    files = ["--prompts", folder / "prompts.yaml", "--labels", folder / "labels.csv"]
    found = run("evaluate", "--index", index, "--resamples", 50, *files)
    assert found["zero_shot"]["n"] == 6 and found["zero_shot"]["patients"] == 3
    assert set(found["zero_shot"]["auc"]) == {"normal", "adenoma", "carcinoma", "macro"}


def test_features_of_another_encoder_are_refused(folder, index, tmp_path, monkeypatch, capsys):
    write(tmp_path / "other.h5", 1, "two")
    monkeypatch.setattr(
        sys, "argv", ["retrieve.py", "query", "--index", str(index), "--slide", str(tmp_path / "other.h5")]
    )
    with pytest.raises(SystemExit) as stop:
        retrieve.main()
    assert stop.value.code == 2
    assert "features of the encoder two, others are of one" in capsys.readouterr().err


def test_all_rows_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "pairs.csv").write_text("slide,text\n,a\nx.svs,b\nmissing.h5,c\n")
    with pytest.raises(InputError) as error:
        from_manifest(tmp_path / "pairs.csv")
    told = error.value.problems
    assert len(told) == 3
    for problem, part in zip(told, ("no `slide`", "x.svs is not a feature file", "no such file"), strict=True):
        assert "pairs.csv:" in problem and part in problem


def test_the_files_of_a_pair_stand_one_after_another(folder):
    paths = [folder / "slides" / f"s{i}.h5" for i in range(2)]
    both = FeatureFiles([paths])[0]
    assert torch.equal(both, torch.cat([FeatureFiles([[path]])[0] for path in paths]))


def test_cases_of_a_recipe_are_taken(folder, tmp_path):
    rows = [
        {
            "id": f"case{i}",
            "patient": f"p{i}",
            "task": task,
            "prompt": "Write the report." if task == "open" else "Is it normal?",
            "answer": f"text of slide {i}, told at length" if task == "open" else "yes",
            # One that is not there is left out.
            "slides": [str(folder / "slides" / f"s{i}.h5"), *([str(folder / "lost.h5")] if i == 2 else [])],
            "split": ("train", "val", "test")[i % 3],
            "question": task,
            **({"options": ["yes", "no"]} if task == "choice" else {}),
        }
        for i, task in enumerate(("open", "open", "open", "choice", "choice", "choice"))
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "cases": {"name": "manifest", "path": str(tmp_path / "cases.jsonl"), "allow_outside": True},
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 32,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    items, files = from_recipe(str(tmp_path / "recipe.yaml"), "test", None)
    assert [(item.id, item.patient, item.text) for item in items] == [
        ("case2", "p2", "text of slide 2, told at length")
    ]
    assert torch.equal(files[0], FeatureFiles([[folder / "slides" / "s2.h5"]])[0])
    with pytest.raises(InputError, match="its questions are choice, open"):
        from_recipe(str(tmp_path / "recipe.yaml"), "test", "choice")


@pytest.mark.parametrize(
    ("prompts", "labels", "message"),
    [
        ("- a", "id,label\ns0,a", "a mapping of each class"),
        ("a: [x", "id,label\ns0,a", "not valid YAML"),
        ("{a: [x], b: [y]}", "id,label\ns9,a", "the id 's9' is not in the index"),
        ("{a: [x], b: [y]}", "id,label\ns0,c\ns1,a", "'c' has no prompts"),
    ],
)
def test_prompts_and_labels_that_do_not_fit_are_refused(
    index, tmp_path, monkeypatch, capsys, prompts, labels, message
):
    (tmp_path / "p.yaml").write_text(prompts)
    (tmp_path / "l.csv").write_text(labels)
    files = ["--prompts", str(tmp_path / "p.yaml"), "--labels", str(tmp_path / "l.csv")]
    monkeypatch.setattr(sys, "argv", ["retrieve.py", "evaluate", "--index", str(index), *files])
    with pytest.raises(SystemExit) as stop:
        retrieve.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--prompts", "p.yaml"], "--prompts needs either --labels"),
        (["--labels", "l.csv"], "--prompts needs either --labels"),
        (["--prompts", "p.yaml", "--config", "r.yaml"], "--config and --question: give both or neither"),
        (["--prompts", "p", "--labels", "l", "--config", "r", "--question", "q"], "--prompts needs either --labels"),
    ],
)
def test_prompts_need_labels(index, extra, message):
    with pytest.raises(InputError, match=message):
        retrieve.parse(["evaluate", "--index", str(index), *extra])


def test_answers_to_another_question_are_labels(folder, tmp_path):
    rows = [
        {
            "id": f"{task}{i}",
            "patient": f"p{i}",
            "task": task,
            "prompt": "Write the report." if task == "open" else "Which?",
            "answer": f"text of slide {i}, told at length" if task == "open" else ("normal", "tumour")[i % 2],
            "slides": [str(folder / "slides" / f"s{i}.h5")],
            "split": ("train", "val", "test")[i % 3],
            "question": task,
            **({"options": ["normal", "tumour"]} if task == "choice" else {}),
        }
        for i in range(6)
        for task in ("open", "choice")
        if (i, task) != (5, "choice")
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "cases": {"name": "manifest", "path": str(tmp_path / "cases.jsonl"), "allow_outside": True},
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 32,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    index = SimpleNamespace(items=from_recipe(str(path), "test", None)[0])
    assert [item.id for item in index.items] == ["open2", "open5"]
    assert recipe_labels(str(path), "choice", index) == {0: "normal"}
    with pytest.raises(
        InputError, match=r"none of the index' 2 slides has an answer to 'grade'.*ask one of choice, open"
    ):
        recipe_labels(str(path), "grade", index)
