"""Terms of the protocols that ship, for rewards that look for findings in free text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.protocol import Field, load_protocol, protocol_names

POLAR = {"present", "positive", "negative", "not identified"}  # values that affirm or deny what the field names


def protocol_vocabulary() -> dict[str, str]:
    """Term -> concept, of every field and value of the protocols.

    A field that is affirmed or denied (lymphovascular invasion, ER) is a concept itself, by all its names: whether it
    is there is for the text to say. Of other fields each value of letters is one, by all its synonyms; a single
    word that several fields have as a value (high, complete) is told apart by the field. A term of several concepts
    stands for itself.
    """
    fields = [e for name in protocol_names() for field in load_protocol(name).fields for e in (field, *field.fields)]
    owners: dict[str, set[str]] = {}
    for field in fields:
        for value in field.values:
            owners.setdefault(value, set()).add(field.id)
    concepts: dict[str, set[str]] = {}
    for field in fields:
        polar = bool(POLAR & set(field.values))
        for concept, terms in _named(field) if polar else _valued(field, owners):
            for term in terms:
                if polar or sum(map(str.isalpha, term)) > 3:
                    concepts.setdefault(term, set()).add(concept)
    return {term: next(iter(found)) if len(found) == 1 else term for term, found in concepts.items()}


def _named(field: Field) -> Iterable[tuple[str, tuple[str, ...]]]:
    return [(field.name, (field.id.replace("_", " "), *field.aliases, field.name))]


def _valued(field: Field, owners: Mapping[str, set[str]]) -> Iterable[tuple[str, tuple[str, ...]]]:
    return [
        (value if " " in value or len(owners[value]) == 1 else f"{field.name}: {value}", (value, *synonyms))
        for value, synonyms in field.values.items()
        if value != UNDETERMINED
    ]
