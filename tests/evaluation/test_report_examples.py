"""What a run was asked, and questions that are none of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from frugalpath.deploy.run import not_an_option
from frugalpath.envs.case import Case
from frugalpath.evaluation.report.examples import example_arguments, foreign, question_examples

CASES = [
    Case(f"c{i}", f"p{i}", "choice", "Is it metastasis?", "normal", images=(f"{i}.png",), options=("met", "normal"))
    for i in range(6)
]
ALONE = replace(CASES[0], id="alone", prompt="What did Mrs. Smith have?")


@pytest.fixture
def summary() -> dict:
    return json.loads(json.dumps({"asked": question_examples(CASES)}))


def test_the_example_asks_the_runs_own_question(summary):
    assert example_arguments(summary) == "--image field.png --question 'Is it metastasis?' --options met normal"
    assert example_arguments({}) == '--image field.png --question "..."'


def test_questions_of_single_patients_are_not_told():
    found = question_examples([*CASES, ALONE])
    assert not found["all"] and "Smith" not in str(found)
    assert foreign(ALONE, {"asked": found}) is None, "others may be as good"


def test_foreign_questions_are_told(summary):
    assert foreign(CASES[0], summary) is None
    assert foreign(replace(CASES[0], prompt="is it  metastasis?", options=("Normal", "MET")), summary) is None
    assert foreign(replace(CASES[0], task="open", options=None), summary) is None
    told = foreign(replace(CASES[0], options=("yes", "no")), summary)
    assert told == "the run was not trained on the options yes, no, only on 'Is it metastasis?' (met, normal)"
    assert foreign(ALONE, summary).startswith("the run was not trained on the question 'What did")
    assert foreign(ALONE, {}) is None, "a report of an earlier version"


def test_an_answer_that_is_no_option_is_told():
    asked = replace(CASES[0], options=("yes", "no"))
    assert not_an_option({"answer": "normal"}, asked) == "the answer 'normal' is not one of the options yes, no"
    assert not_an_option({"answer": "(A) Yes."}, asked) is None
    assert not_an_option({"answer": None}, asked) is None, "told in the row"
    assert not_an_option({"answer": "normal"}, replace(asked, options=None)) is None
