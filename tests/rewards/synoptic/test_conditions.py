import pytest

from frugalpath.errors import InputError
from frugalpath.rewards.synoptic.conditions import read_condition, read_rule


def holds(condition, **record):
    return read_condition(condition, "here").holds(record)


def test_values_and_alternatives():
    assert holds({"margin": "involved"}, margin="Involved") and not holds({"margin": "involved"}, margin="clear")
    assert holds({"grade": [2, 3]}, grade="3") and not holds({"grade": [2, 3]}, grade="1")
    assert holds({"a": "x", "b": "y"}, a="x", b="y") and not holds({"a": "x", "b": "y"}, a="x", b="z")
    assert holds([{"a": "x"}, {"b": "y"}], a="z", b="y") and not holds([{"a": "x"}, {"b": "y"}], a="z", b="z")
    assert holds({"site": "left"}, site=["right", "left"])


@pytest.mark.parametrize(("value", "expected"), [(0, False), (1, True), (3, True), (3.5, False), ("many", False)])
def test_bounds(value, expected):
    assert holds({"nodes": "> 0, <= 3"}, nodes=value) is expected


def test_null_missing_and_undetermined_fields_make_a_condition_false():
    for condition in ({"a": "x"}, {"a": "answered"}, {"a": {"not": "x"}}, {"a": "> 0"}):
        assert not holds(condition)
        assert not holds(condition, a=None)
        assert not holds(condition, a="cannot be determined")
    assert holds({"a": "cannot be determined"}, a="cannot be determined")
    assert holds({"a": "answered"}, a="anything")


def test_not_asks_for_an_answer_that_is_none_of_the_values():
    assert holds({"pt": {"not": ["T4a", "T4b"]}}, pt="T2") and not holds({"pt": {"not": ["T4a", "T4b"]}}, pt="T4a")
    assert not holds({"site": {"not": "left"}}, site=["right", "left"])


def test_rules():
    total = read_rule({"sum": ["a", "b"]}, "here")
    assert total.allowed({"a": "3", "b": 4}) == (7,)
    assert total.allowed({"a": "3"}) is None
    assert total.allowed({"a": "3", "b": "cannot be determined"}) is None
    rule = read_rule({"value": ["T2", "T3"], "if": {"size": "> 2"}}, "here")
    assert rule.allowed({"size": 3}) == ("T2", "T3") and rule.allowed({"size": 2}) is None


@pytest.mark.parametrize("condition", [[], {}, "x", [{}], {"a": {"or": "x"}}, {"a": "> x"}, {"a": "> 1, 2"}], ids=str)
def test_a_wrong_condition_is_named(condition):
    with pytest.raises(InputError, match="here"):
        read_condition(condition, "here")


@pytest.mark.parametrize("rule", ["x", {}, {"if": {"a": "x"}}, {"value": 1, "when": {"a": "x"}}], ids=str)
def test_a_wrong_rule_is_named(rule):
    with pytest.raises(InputError, match="here"):
        read_rule(rule, "here")
