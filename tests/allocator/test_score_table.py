from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from frugalpath.allocator.score_table import COLUMNS, ScoreTable, TableKey, score_table
from frugalpath.envs.case import case_columns, extra_columns
from frugalpath.errors import InputError
from frugalpath.recipe.cache_key import reward_digest
from frugalpath.rewards.registry import get_rewards
from frugalpath.rewards.scoring import Scorer


@pytest.fixture
def table() -> ScoreTable:
    rng = np.random.default_rng(0)
    return ScoreTable(
        ["c0", "c1", "c2"],
        ["p0", "p0", "p1"],
        ["q", "q", "r"],
        [0, 1, 16],
        rng.random((3, 3)),
        rng.random((3, 3)),
        np.array([[0, 1, 16]] * 3),
        rng.integers(10, 20, (3, 3)),
        rng.integers(1, 5, (3, 3)),
        rng.random((3, 3)),
        [[f'"{i}\n{k} ü' for k in range(3)] for i in range(3)],
    )


def test_a_saved_table_is_read_back_whole(table, tmp_path):
    table.save(tmp_path / "new" / "t.jsonl")
    again = ScoreTable.load(tmp_path / "new" / "t.jsonl")
    for field in dataclasses.fields(ScoreTable):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(table, field.name))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.jsonl"]


def test_columns_are_taken_by_budget(table):
    part = table.at([16, 0])
    assert part.budgets == [16, 0]
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(part, name), getattr(table, name)[:, [2, 0]])
    assert part.text == [[row[2], row[0]] for row in table.text]
    assert part.ids == table.ids
    with pytest.raises(ValueError, match="4"):
        table.at([4])


def test_a_table_of_an_earlier_version_is_refused(table, tmp_path):
    table.save(tmp_path / "t.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    old = [json.dumps({k: v for k, v in row.items() if k != "flops"}) for row in lines]
    (tmp_path / "t.jsonl").write_text("\n".join(old))
    with pytest.raises(InputError, match=r"t\.jsonl: has no flops.*delete the file"):
        ScoreTable.load(tmp_path / "t.jsonl")


def test_a_table_answers_every_case_at_every_budget(performer, cases, tmp_path):
    scorer = Scorer(get_rewards(["choice"]), 16)
    path = tmp_path / "t.jsonl"
    made = score_table(performer, cases[:4], [0, 4], scorer, 4, path=path)
    assert made.score.shape == (4, 2) and made.budgets == [0, 4]
    assert made.visual.tolist() == [[0, 4]] * 4
    assert (made.ids, made.patients) == ([c.id for c in cases[:4]], [c.patient for c in cases[:4]])
    alone = [[performer.answer([c], [b], 4)[0].text for b in (0, 4)] for c in cases[:4]]
    assert made.text == alone
    # The second time it is read, whatever the performer would say.
    written = path.read_text()
    path.write_text(written.replace(json.dumps(made.text[0][1]), '"renamed"', 1))
    assert score_table(performer, cases[:4], [0, 4], scorer, 4, path=path).text[0][1] == "renamed"


def make_data(cases, base, rewards=("choice",), max_new_tokens=4):
    run = SimpleNamespace(rewards=list(rewards), base=base)
    return SimpleNamespace(run=run, splits={"val": cases}, max_new_tokens=max_new_tokens)


def test_a_table_knows_what_it_was_made_of(performer, cases, tmp_path, monkeypatch):
    """Labels mended in place, rows added, another reward file or length: new gold answers stood beside old scores."""
    reward_file = tmp_path / "mine.py"
    reward_file.write_text(
        "def mine(completions, answer, **columns):\n    return [float(len(a) % 2) for a in answer]\n"
    )
    name, path, made = "mine.py:mine", tmp_path / "t.jsonl", []
    answer = performer.answer

    def counted(shown, *args):
        made.append(len(shown))
        return answer(shown, *args)

    monkeypatch.setattr(performer, "answer", counted)

    def again(members=tuple(cases[:4]), key=("sft",), max_new_tokens=4):
        data = make_data(list(members), tmp_path, [name], max_new_tokens)
        scorer = Scorer(get_rewards([name], base=tmp_path), 16)
        made.clear()
        stage = TableKey.of(data, {"stage": key}, data.splits["val"])
        found = score_table(performer, data.splits["val"], [4], scorer, max_new_tokens, path=path, key=stage)
        return found.score[:, 0].tolist(), sum(made)

    first, answered = again()
    assert answered == 4 and again() == (first, 0)
    mended = [dataclasses.replace(cases[0], answer=cases[0].answer + "x"), *cases[1:4]]
    assert again(mended) == ([1 - first[0], *first[1:]], 0), (
        "a mended label is scored against the answer that is there"
    )
    assert again() == (first, 0)
    assert again(max_new_tokens=3)[1] == 4 and again()[1] == 4, "answers of another length are other answers"
    assert again(key=("grpo",))[1] == 4 and again()[1] == 4, "so are those of another performer"
    assert again(cases[:5])[1] == 5, "and those to other cases"
    asked = [dataclasses.replace(cases[0], prompt="Is it?"), *cases[1:5]]
    assert again(asked)[1] == 5, "and those to other questions"


def test_a_changed_reward_file_is_another_digest(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(completions, **columns):\n    return [1.0]\n")
    run = SimpleNamespace(rewards=[{"name": "mine.py:mine"}], base=tmp_path)
    before = reward_digest(run)
    (tmp_path / "mine.py").write_text("def mine(completions, **columns):\n    return [0.0]\n")
    assert reward_digest(run) != before


def say(answer: str) -> str:
    return f"<think></think><answer>{answer}</answer>"


def test_shaping_rewards_do_not_count_as_right(cases):
    specs = ["choice", {"name": "format", "weight": 5.0}]
    scorer = Scorer(get_rewards(specs), 16)
    assert [r.name for r in scorer.rewards] == ["choice"]
    scores = scorer([say("normal"), say("tumour")], cases[:1] * 2, [1, 4], [1, 4])
    assert scores.tolist() == [1.0, 0.0]


def test_a_score_is_the_weighted_mean_of_the_rewards_that_apply(cases, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def by_budget(completions, budget, tokens, max_budget, grade, **columns):\n"
        "    return [None if g is None else t / m if b >= t else -1.0"
        " for b, t, m, g in zip(budget, tokens, max_budget, grade, strict=True)]\n"
    )
    rewards = get_rewards(["choice", {"name": "mine.py:by_budget", "weight": 3.0}], base=tmp_path)
    graded = dataclasses.replace(cases[0], extra={"grade": 2})
    scores = Scorer(rewards, 16)([say("normal")] * 2, [graded, cases[0]], [4, 4], [4, 4])
    assert scores.tolist() == pytest.approx([(1 + 3 * 0.25) / 4, 1.0])


def test_a_reward_of_the_users_that_only_shapes_does_not_count_as_right(cases, tmp_path):
    (tmp_path / "mine.py").write_text("def brevity(completions):\n    return [1.0 for _ in completions]\n")
    brevity = {"name": "mine.py:brevity", "weight": 0.2}
    for spec, wrong in ((brevity, 0.2 / 1.2), ({**brevity, "scores": False}, 0.0), ({**brevity, "weight": -0.2}, 0.0)):
        rewards = get_rewards(["choice", spec], base=tmp_path)
        scores = Scorer(rewards, 16)([say("normal"), say("tumour")], cases[:1] * 2, [1, 1], [1, 1])
        assert scores.tolist() == pytest.approx([1.0, wrong])
        assert rewards[1].score_weight == pytest.approx(0.2 if wrong else 0.0)


def test_a_case_that_no_reward_scores_is_named(cases):
    open_case = dataclasses.replace(cases[1], id="free-text", task="open", options=None)
    with pytest.raises(InputError, match=r"case free-text: no reward scores its task 'open' \(asked: choice\)"):
        Scorer(get_rewards(["choice"]), 16)([say("a"), say("b")], [cases[0], open_case], [1, 1], [1, 1])


@pytest.mark.parametrize(
    "specs", [["format"], ["format", {"name": "choice", "weight": 0}], [{"name": "ap50", "scores": False}]]
)
def test_rewards_that_say_nothing_of_right_and_wrong_are_refused(specs):
    with pytest.raises(InputError, match="add choice, ap50 or your own"):
        Scorer(get_rewards(specs), 16)


def test_columns_are_alike_for_all_cases(cases):
    graded = dataclasses.replace(cases[0], extra={"grade": 2, "site": "lung"})
    names = extra_columns([graded, cases[1]])
    assert names == ["grade", "site"]
    first, second = (case_columns(c, names) for c in (graded, cases[1]))
    assert first.keys() == second.keys()
    assert (first["grade"], second["grade"]) == (2, None)
    assert first["options"] == ["normal", "tumour"] and "prompt" not in first
