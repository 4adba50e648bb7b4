"""Conditions and derivations of protocol files: `applies_if`, and values that follow from other values.

A condition is a mapping from field ids to what their values must be; all of them must hold. A list of mappings holds
where any of them does.

    applies_if: {margin_status: involved}                 # the value
    applies_if: {grade_group: [2, 3]}                     # one of them
    applies_if: {nodes_positive: "> 0, <= 3"}             # comparisons, all of which hold
    applies_if: {dcis: answered}                          # any value but null and "cannot be determined"
    applies_if: {pt: {not: [T4a, T4b]}}                   # answered, and none of them

A field that is null or missing makes a condition on it false. A field of several values meets it where one of its
values does, and `not` where none does.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugalpath.errors import InputError
from frugalpath.rewards.label import normalise

UNDETERMINED = "cannot be determined"

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_BOUND = re.compile(r"\s*(<=|>=|<|>)\s*(-?[0-9]+(?:\.[0-9]+)?)\s*")


@dataclass(frozen=True)
class Test:
    """What one field must be: among `values`, within `bounds`, or, where both are empty, answered at all."""

    field: str
    values: frozenset[str] = frozenset()
    bounds: tuple[tuple[str, float], ...] = ()
    negated: bool = False

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record's value passes."""
        found = record.get(self.field)
        values = [v for v in (found if isinstance(found, list) else [found]) if v is not None]
        if not values or (len(values) == 1 and values[0] == UNDETERMINED and UNDETERMINED not in self.values):
            return False
        if self.bounds:
            return any(
                isinstance(v, (int, float)) and all(_COMPARE[sign](v, bound) for sign, bound in self.bounds)
                for v in values
            )
        if not self.values:
            return True
        return any(normalise(str(v)) in self.values for v in values) != self.negated


@dataclass(frozen=True)
class Condition:
    """Any of several alternatives, each a set of tests that all hold."""

    alternatives: tuple[tuple[Test, ...], ...]

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record meets the condition."""
        return any(all(test.holds(record) for test in tests) for tests in self.alternatives)

    @property
    def fields(self) -> set[str]:
        """Ids of the fields it looks at."""
        return {test.field for tests in self.alternatives for test in tests}


@dataclass(frozen=True)
class Rule:
    """What a field's value must be where a condition holds, or the sum of other fields.

    Args:
        values: one value: the field follows. Several: the field must be one of them.
        condition: None for a rule that always holds.
        sum_of: ids of whole-number fields that the value is the sum of; `values` is empty then.
    """

    values: tuple[Any, ...]
    condition: Condition | None
    sum_of: tuple[str, ...] = ()

    def allowed(self, record: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """The values that are consistent with the rest of a record; None where the rule says nothing."""
        if self.condition is not None and not self.condition.holds(record):
            return None
        if not self.sum_of:
            return self.values
        parts = [record.get(name) for name in self.sum_of]
        try:
            return (sum(int(part) for part in parts if part is not None),) if None not in parts else None
        except (TypeError, ValueError):  # a part that is no number, such as "cannot be determined"
            return None


def read_condition(value: Any, where: str) -> Condition:
    """A condition as a protocol file writes it.

    Raises:
        InputError: saying what is wrong with the entry that `where` names.
    """
    alternatives = value if isinstance(value, list) else [value]
    if not alternatives or not all(isinstance(a, Mapping) and a for a in alternatives):
        raise InputError(f"{where}: {value!r} is not a valid condition; write {{field: value}}, or a list of such")
    return Condition(tuple(tuple(_test(str(k), v, where) for k, v in a.items()) for a in alternatives))


def read_rule(value: Any, where: str) -> Rule:
    """One entry of `derive`: `{value: v, if: {...}}`, `{value: [v, w], if: {...}}` or `{sum: [field, ...]}`.

    Raises:
        InputError: saying what is wrong with the entry that `where` names.
    """
    if not isinstance(value, Mapping) or not ({"value", "sum"} & set(value)) or set(value) - {"value", "sum", "if"}:
        raise InputError(
            f"{where}: {value!r} is not a valid rule; write {{value: ..., if: {{...}}}} or {{sum: [...]}}"
        )
    condition = read_condition(value["if"], where) if "if" in value else None
    if "sum" in value:
        if not isinstance(value["sum"], list):
            raise InputError(f"{where}: `sum` must list fields, not {value['sum']!r}")
        return Rule((), condition, tuple(map(str, value["sum"])))
    values = value["value"] if isinstance(value["value"], list) else [value["value"]]
    return Rule(tuple(values), condition)


def _test(field: str, value: Any, where: str) -> Test:
    if isinstance(value, Mapping):
        if set(value) != {"not"}:
            raise InputError(f"{where}: {value!r} for {field!r}; a mapping here can only be {{not: [...]}}")
        return Test(field, _values(value["not"]), negated=True)
    if value == "answered":
        return Test(field)
    if isinstance(value, str) and value.lstrip()[:1] in ("<", ">"):
        parts = [_BOUND.fullmatch(part) for part in value.split(",")]
        if None in parts:
            raise InputError(f'{where}: {value!r} for {field!r} is not a valid comparison; write "> 0" or "> 0, <= 3"')
        return Test(field, bounds=tuple((match[1], float(match[2])) for match in parts if match))
    return Test(field, _values(value))


def _values(value: Any) -> frozenset[str]:
    entries: Sequence[Any] = value if isinstance(value, list) else [value]
    return frozenset(normalise(str(entry)) for entry in entries)
