"""Checking a synoptic record against its protocol: allowed values, conditions, and consistency between fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.protocol import Field, Protocol
from frugalpath.rewards.synoptic.values import Unreadable, read_value


def check_record(record: Mapping[str, Any], protocol: Protocol, complete: bool = False) -> list[str]:
    """List the problems of a record as sentences.

    Args:
        record: field id -> value.
        protocol: of the record.
        complete: also name the required fields that are not answered.
    """
    problems = [f"{name!r} is not a field of {protocol.title}" for name in record if name not in protocol.by_id]
    problems += _field_problems(protocol.fields, record, complete)
    for field in protocol.fields:
        for number, entry in enumerate(record.get(field.id) or [] if field.type == "list" else [], start=1):
            found = _field_problems(field.fields, entry, complete) if isinstance(entry, Mapping) else []
            problems += [f"{field.name}, {number}: {problem}" for problem in found]
    return problems


def _field_problems(fields: Sequence[Field], record: Mapping[str, Any], complete: bool) -> list[str]:
    """Problems of the fields of a record, or of one entry of a list."""
    problems = []
    for field in fields:
        value = record.get(field.id)
        if value is None:
            if complete and field.required(record) and field.id not in record:
                problems.append(f"{field.name}: not answered; it is required here")
            continue
        problems += _value_problems(field, value)
        if not field.applies(record):
            problems.append(f"{field.name}: answered with {_shown(value)}, but it does not apply to this case")
        elif (expected := expected_values(field, record)) is not None and not _among(field, value, expected):
            wanted = " or ".join(map(str, expected))
            problems.append(f"{field.name}: {_shown(value)} does not agree with the other fields, which give {wanted}")
    return problems


def expected_values(field: Field, record: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The values of a field that agree with the rest of a record, by the first rule that speaks, or None."""
    for rule in field.derive:
        if (allowed := rule.allowed(record)) is not None:
            return allowed
    return None


def derive(record: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    """A record with the fields that follow from others filled in, where they are missing and one value alone fits."""
    filled = dict(record)
    for field in protocol.fields:
        if field.id not in filled and field.derive and field.applies(filled):
            expected = expected_values(field, filled)
            if expected is not None and len(expected) == 1:
                filled[field.id] = read_value(field, str(expected[0]))
    return protocol.ordered(filled)


def _value_problems(field: Field, value: Any) -> list[str]:
    try:
        read = read_value(field, value)
    except Unreadable as error:
        return [str(error)]
    if read == value or field.type == "text":
        return []
    return [f"{field.name}: {_shown(value)} is not in its own form, which is {_shown(read)}"]


def _among(field: Field, value: Any, expected: tuple[Any, ...]) -> bool:
    if value == UNDETERMINED:
        return True
    values = value if isinstance(value, list) else [value]
    return bool({normalise(str(v)) for v in values} & {normalise(str(e)) for e in expected})


def _shown(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else repr(value)
        if isinstance(value, str)
        else str(value)
    )
