from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from frugalpath.bootstrap import Bootstrap
from frugalpath.errors import InputError
from frugalpath.rewards.zero_shot import classification

CLASSES = ("normal", "adenoma", "carcinoma")


def drawn(n: int, signal: float, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Probabilities (n, 3), labels and patients."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n)
    raw = np.exp(rng.normal(size=(n, 3)) + signal * np.eye(3)[truth])
    return raw / raw.sum(1, keepdims=True), [CLASSES[i] for i in truth], [f"p{i // 2}" for i in range(n)]


def test_figures_are_those_of_scikit_learn():
    values, labels, patients = drawn(200, 1.0)
    found = classification(values, labels, CLASSES, patients, resamples=100)
    for i, name in enumerate(CLASSES):
        assert found["auc"][name]["value"] == roc_auc_score(np.array(labels) == name, values[:, i])
    assert found["auc"]["macro"]["value"] == pytest.approx(
        roc_auc_score(labels, values[:, [1, 2, 0]], multi_class="ovr", average="macro")
    )
    chosen = np.array(CLASSES)[values.argmax(1)]
    assert found["balanced_accuracy"]["value"] == pytest.approx(balanced_accuracy_score(labels, chosen))
    assert (found["n"], found["patients"], found["absent"]) == (200, 100, [])
    for each in (*found["auc"].values(), found["balanced_accuracy"]):
        assert each["ci95"][0] < each["value"] < each["ci95"][1]
    json.dumps(found)


def test_intervals_cover_chance_without_signal_and_narrow_with_slides():
    none = classification(*args(drawn(300, 0.0)), resamples=300)
    assert none["auc"]["macro"]["ci95"][0] < 0.5 < none["auc"]["macro"]["ci95"][1]
    few = classification(*args(drawn(40, 1.0)), resamples=300)
    many = classification(*args(drawn(640, 1.0)), resamples=300)
    ratio = np.diff(few["auc"]["macro"]["ci95"])[0] / np.diff(many["auc"]["macro"]["ci95"])[0]
    assert 2.5 < ratio < 6.5  # the root of 16, give or take


def args(made):
    values, labels, patients = made
    return values, labels, CLASSES, patients


def test_the_interval_is_of_scikit_learn_s_figures_of_resamples():
    values, labels, patients = drawn(60, 1.0)
    values = values.round(1)  # with ties
    found = classification(values, labels, CLASSES, patients, resamples=200)
    weights = Bootstrap(patients, 200).weight[:, np.unique(patients, return_inverse=True)[1]]
    is_it = np.array(labels) == "adenoma"
    each = [roc_auc_score(is_it, values[:, 1], sample_weight=weight) for weight in weights]
    assert found["auc"]["adenoma"]["ci95"] == pytest.approx(np.quantile(each, [0.025, 0.975]), abs=1e-5)


def test_a_class_without_slides_is_named_and_left_out():
    values, labels, patients = drawn(60, 2.0)
    kept = [i for i, label in enumerate(labels) if label != "adenoma"]
    found = classification(values[kept], [labels[i] for i in kept], CLASSES, [patients[i] for i in kept], resamples=50)
    assert found["absent"] == ["adenoma"] and "adenoma" not in found["auc"]
    assert found["balanced_accuracy"]["value"] <= 1


def test_resamples_without_a_class_do_not_count():
    values = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found = classification(values, ["a", "a", "b"], ["a", "b"], ["p", "q", "r"], resamples=200)
    assert found["auc"]["a"] == {"value": 1, "ci95": [1, 1]}
    assert found["balanced_accuracy"] == {"value": 1, "ci95": [1, 1]}


def test_labels_that_cannot_be_scored_are_refused():
    with pytest.raises(InputError, match="'c' has no prompts"):
        classification(np.ones((2, 2)), ["a", "c"], ["a", "b"], ["p", "q"])
    with pytest.raises(InputError, match="the same label"):
        classification(np.ones((2, 2)), ["a", "a"], ["a", "b"], ["p", "q"])
