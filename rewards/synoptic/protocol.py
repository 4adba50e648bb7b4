"""Synoptic protocols: the fields of a structured report, as YAML files in `configs/protocols` describe them.

A protocol names facts (which elements a report of one kind has, and their values) in our own wording; it is not a CAP
product. `docs/protocols.md` explains the keys of a file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalpath.errors import InputError
from frugalpath.parsing import read_yaml
from frugalpath.rewards.calling import hint
from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.conditions import UNDETERMINED, Condition, Rule, read_condition, read_rule

_PLAIN = re.compile(r"\w[\w.-]*")
FOLDER = Path(__file__).resolve().parents[2] / "configs" / "protocols"

TYPES = ("categorical", "ordinal", "boolean", "multi", "number", "integer", "text", "list")
CODED = ("categorical", "ordinal", "boolean", "multi")  # types whose values are written in the protocol
REQUIREMENTS = ("core", "conditional", "optional")
UNITS = {
    "um": 1e-3,
    "µm": 1e-3,
    "μm": 1e-3,
    "mm": 1.0,
    "cm": 10.0,
    "m": 1e3,
    "g": 1.0,
    "mg": 1e-3,
    "kg": 1e3,
    "%": 1.0,
}
LENGTHS, MASSES = {"um", "µm", "μm", "mm", "cm", "m"}, {"g", "mg", "kg"}

# What every boolean field can say, and how else it is written.
BOOLEAN = {
    "present": ("yes", "positive", "identified", "seen", "true"),
    "not identified": ("no", "absent", "negative", "none", "none identified", "not present", "not seen", "false"),
    UNDETERMINED: (),
}
UNDETERMINED_WORDS = ("cannot be assessed", "undetermined", "indeterminate", "cbd", "not determinable", "unknown")
NULL_WORDS = ("not applicable", "n/a", "na", "n.a", "null", "none", "not reported", "not stated", "not given")


@dataclass(frozen=True)
class Field:
    """One element of a report.

    Args:
        id: key in records. name: what stands before the colon; aliases: other names for it.
        section: heading it belongs to.
        type: one of `TYPES`. `boolean` is present / not identified / cannot be determined.
        requirement: `core` (always answered), `conditional` (answered where `applies_if` holds) or `optional`.
        values: allowed value -> synonyms, in rank order for `ordinal`; of the coded types alone.
        open: a coded value that is not listed is kept as text instead of being unreadable.
        applies_if: the condition, on the rest of the record, under which the field applies at all.
        unit: of numbers; values are converted to it.
        tolerance: (absolute, relative): a number is right within the larger of the two.
        threshold: least similarity, 0..1, at which a text is right.
        critical: belongs to the critical set.
        groups: group -> values or, for open values and text, words; a value of another group than the gold's is a
            critical error (benign for malignant, an involved margin for a clear one).
        weight: in the case score.
        inferable: whether one stained slide can show it; the corpus report gives these fields apart.
        derive: rules for what the value must be, given other fields.
        fields: of the entries of a `list`. key: ids of those that tell entries apart.
    """

    id: str
    name: str
    type: str
    section: str = ""
    aliases: tuple[str, ...] = ()
    requirement: str = "optional"
    values: Mapping[str, tuple[str, ...]] = None  # type: ignore[assignment]  # set by _field
    open: bool = False
    applies_if: Condition | None = None
    unit: str | None = None
    tolerance: tuple[float, float] = (0.0, 0.0)
    threshold: float = 0.85
    critical: bool = False
    groups: Mapping[str, frozenset[str]] = None  # type: ignore[assignment]
    weight: float = 1.0
    inferable: bool = True
    derive: tuple[Rule, ...] = ()
    fields: tuple[Field, ...] = ()
    key: tuple[str, ...] = ()

    def __hash__(self) -> int:  # by identity: a protocol is read once a process, and fields are keys of caches
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @functools.cached_property
    def lookup(self) -> dict[str, str]:
        """Normalised value or synonym -> value; "cannot be determined" is always among them."""
        found = {normalise(word): UNDETERMINED for word in (UNDETERMINED, *UNDETERMINED_WORDS)}
        for value, synonyms in self.values.items():
            found |= {normalise(word): value for word in synonyms}
        return found | {normalise(value): value for value in self.values}

    @functools.cached_property
    def rank(self) -> dict[str, int]:
        """Value -> position, "cannot be determined" left out."""
        return {value: i for i, value in enumerate(v for v in self.values if v != UNDETERMINED)}

    @functools.cached_property
    def inner(self) -> dict[str, Field]:
        """Fields of a list's entries by normalised name, alias and id."""
        return names_of(self.fields)

    def applies(self, record: Mapping[str, Any]) -> bool:
        """Whether the field applies to a case with this (gold) record."""
        return self.applies_if is None or self.applies_if.holds(record)

    def required(self, record: Mapping[str, Any]) -> bool:
        """Whether a complete report of this case answers the field."""
        return self.requirement != "optional" and self.applies(record)


@dataclass(frozen=True)
class Protocol:
    """A kind of synoptic report.

    Args:
        id: name of its file. title, version, source: as the file gives them; `source` cites what the fields follow.
        layout: `lines` ("name: response"), or `biopsy` for the free layout of biopsy reports.
        fields: in the order of the report.
    """

    id: str
    title: str
    version: str
    source: str
    layout: str
    fields: tuple[Field, ...]

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @functools.cached_property
    def by_id(self) -> dict[str, Field]:
        """Fields by id."""
        return {field.id: field for field in self.fields}

    @functools.cached_property
    def by_name(self) -> dict[str, Field]:
        """Fields by normalised name, alias and id."""
        return names_of(self.fields)

    def ordered(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record with its fields in the order of the report."""
        return {field.id: record[field.id] for field in self.fields if field.id in record}

    @functools.cached_property
    def sections(self) -> frozenset[str]:
        """Normalised headings."""
        return frozenset(normalise(field.section) for field in self.fields if field.section)


def names_of(fields: Sequence[Field]) -> dict[str, Field]:
    """Fields by every name they go by, normalised."""
    return {normalise(n): f for f in fields for n in (f.id, f.id.replace("_", " "), *f.aliases, f.name)}


def protocol_names() -> list[str]:
    """Names of the protocols that ship with the toolkit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str | Path) -> Protocol:
    """A protocol by name (a file of `configs/protocols`) or by the path of a YAML file; read once a process.

    Raises:
        InputError: no such protocol, or everything that is wrong with its file.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not _PLAIN.fullmatch(str(name)) or not path.is_file():  # names come from manifests: never a path
            raise InputError(
                f"unknown protocol {str(name)!r}; {hint(name, protocol_names())}. "
                "A file of your own is named by its path, ending in .yaml"
            )
    if not path.is_file():
        raise InputError(f"no protocol file {path}")
    return _load(path.resolve())


@functools.cache
def _load(path: Path) -> Protocol:
    raw = _raw(path)
    problems: list[str] = []
    known = {"title", "version", "source", "layout", "extends", "fields"}
    problems += [f"{path.name}: unknown key {key!r}; known: {', '.join(sorted(known))}" for key in set(raw) - known]
    problems += [f"{path.name}: `{key}` is missing" for key in ("title", "version", "source") if not raw.get(key)]
    layout = raw.get("layout", "lines")
    if layout not in ("lines", "biopsy"):
        problems.append(f"{path.name}: `layout` is {layout!r}; use lines or biopsy")
    fields = _fields(raw.get("fields"), path.name, problems)
    if problems:
        raise InputError(problems)
    return Protocol(path.stem, str(raw["title"]), str(raw["version"]), str(raw["source"]), layout, fields)


def _raw(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, with the fields of the protocol it `extends` under its own."""
    try:
        raw = read_yaml(path)
    except InputError as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a protocol file is a mapping with title, version, source and fields")
    if "extends" not in raw:
        return raw
    parent = path.parent / f"{raw['extends']}.yaml"
    if not _PLAIN.fullmatch(str(raw["extends"])) or not parent.is_file() or parent in (*seen, path):
        raise InputError(f"{path}: `extends` names {raw['extends']!r}, which is not another protocol in its folder")
    base = _raw(parent, (*seen, path))
    parts = [r.get("fields") or [] for r in (raw, base)]
    if not all(
        isinstance(p, list) and all(isinstance(f, dict) and isinstance(f.get("id"), str) for f in p) for p in parts
    ):
        return raw  # `_fields` says so
    own = {f.get("id"): f for f in raw.get("fields") or []}
    merged = [own.pop(f.get("id"), f) for f in base.get("fields") or []]
    return {**base, **raw, "fields": [*merged, *own.values()]}


def _fields(raw: Any, where: str, problems: list[str]) -> tuple[Field, ...]:
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
        problems.append(f"{where}: `fields` must be a list of mappings, each with id, name and type")
        return ()
    fields: list[Field] = []
    for i, entry in enumerate(raw):
        try:
            fields.append(_field(entry, f"{where}: field {entry.get('id', f'number {i + 1}')!r}"))
        except InputError as error:
            problems += error.problems
    ids = [field.id for field in fields]
    problems += [f"{where}: field {name!r} stands twice" for name in sorted({n for n in ids if ids.count(n) > 1})]
    owner: dict[str, Field] = {}
    for field in fields:
        for name in names_of([field]):
            if owner.setdefault(name, field) is not field:
                problems.append(f"{where}: fields {owner[name].id!r} and {field.id!r} are both called {name!r}")
        conditions = [field.applies_if, *(rule.condition for rule in field.derive)]
        asked = {name for c in conditions if c for name in c.fields} | {n for r in field.derive for n in r.sum_of}
        if len(ids) == len(raw):
            problems += [
                f"{where}: field {field.id!r} looks at {n!r}, which is not a field" for n in sorted(asked - set(ids))
            ]
    by_id = {field.id: field for field in fields}
    problems += [problem for field in fields for problem in _strange_values(field, by_id, where)]
    return tuple(fields)


def _strange_values(field: Field, by_id: Mapping[str, Field], where: str) -> list[str]:
    """Values in conditions, rules and groups that the field they are of cannot have: they would never be met."""
    conditions = [field.applies_if, *(rule.condition for rule in field.derive)]
    tests = [test for c in conditions if c for tests in c.alternatives for test in tests]
    used = [(by_id[test.field], word) for test in tests if test.field in by_id for word in test.values]
    used += [(field, str(value)) for rule in field.derive for value in rule.values]
    used += [(field, word) for words in field.groups.values() for word in words]
    strange = dict.fromkeys(
        (of.id, word)
        for of, word in used
        if of.values and not of.open and normalise(word) not in map(normalise, (*of.values, UNDETERMINED))
    )
    return [f"{where}: field {field.id!r} names {word!r}, which is not a value of {of!r}" for of, word in strange]


_KEYS = {
    "id", "name", "type", "section", "aliases", "class", "values", "open", "applies_if", "unit", "tolerance",
    "threshold", "critical", "groups", "weight", "inferable", "derive", "fields", "key",
}  # fmt: skip
_SHAPES: tuple[tuple[tuple[str, ...], type | tuple[type, ...], str], ...] = (
    (("aliases", "derive", "key"), list, "a list"),
    (("groups",), dict, "a mapping of lists"),
    (("threshold", "weight"), (int, float), "a number"),
    (("open", "critical", "inferable"), bool, "true or false"),
)


def _field(raw: dict[str, Any], where: str) -> Field:
    problems = [f"{where}: unknown key {key!r}; known: {', '.join(sorted(_KEYS))}" for key in set(raw) - _KEYS]
    bare = [k for k in ("id", "type", "class", "unit") if k in raw and not isinstance(raw[k], str)]
    if bare:
        raise InputError(problems + [f"{where}: `{k}` must be a word, not {raw[k]!r}" for k in bare])
    kind, name = raw.get("type"), raw.get("id")
    if not isinstance(name, str) or not name.isidentifier():
        problems.append(f"{where}: `id` must be a word of letters, digits and underscores")
    if kind not in TYPES:
        problems.append(f"{where}: `type` is {kind!r}; use one of {', '.join(TYPES)}")
    if (requirement := raw.get("class", "optional")) not in REQUIREMENTS:
        problems.append(f"{where}: `class` is {requirement!r}; use one of {', '.join(REQUIREMENTS)}")
    if requirement == "conditional" and "applies_if" not in raw:
        problems.append(f"{where}: a conditional field needs `applies_if`")
    wrong = [(k, what) for keys, shape, what in _SHAPES for k in keys if k in raw and not isinstance(raw[k], shape)]
    if wrong or not all(isinstance(words, list) for words in (raw.get("groups") or {}).values()):
        wrong = wrong or [("groups", "a mapping of lists")]
        raise InputError(problems + [f"{where}: `{k}` must be {what}, not {raw.get(k)!r}" for k, what in wrong])
    values = _field_values(raw.get("values"), kind, where, problems)
    if (unit := raw.get("unit")) is not None and unit not in UNITS:
        problems.append(f"{where}: `unit` is {unit!r}; known: {', '.join(UNITS)}")
    tolerance = raw.get("tolerance", 0)
    tolerance = (tolerance, 0) if not isinstance(tolerance, dict) else tuple(tolerance.get(k, 0) for k in _TOLERANCE)
    if not all(isinstance(t, (int, float)) and t >= 0 for t in tolerance) or (
        isinstance(raw.get("tolerance"), dict) and set(raw["tolerance"]) - set(_TOLERANCE)
    ):
        problems.append(f"{where}: `tolerance` must be a number or {{absolute: ..., relative: ...}}, 0 or more")
    inner: tuple[Field, ...] = ()
    if kind == "list":
        inner = _fields(raw.get("fields"), where, problems)
        if any(field.type == "list" for field in inner):
            problems.append(f"{where}: an entry of a list cannot hold a list")
    key = tuple(map(str, raw.get("key", [inner[0].id] if inner else [])))
    problems += [
        f"{where}: `key` names {k!r}, which is not one of its fields" for k in key if k not in {f.id for f in inner}
    ]
    groups = {str(g): frozenset(normalise(str(v)) for v in vs) for g, vs in (raw.get("groups") or {}).items()}
    applies_if, derive = None, []
    try:
        applies_if = read_condition(raw["applies_if"], f"{where}: `applies_if`") if "applies_if" in raw else None
        derive = [read_rule(rule, f"{where}: `derive`") for rule in raw.get("derive", [])]
    except InputError as error:
        problems += error.problems
    if problems:
        raise InputError(problems)
    return Field(
        id=str(name),
        name=str(raw.get("name") or str(name).replace("_", " ").capitalize()),
        type=str(kind),
        section=str(raw.get("section", "")),
        aliases=tuple(map(str, raw.get("aliases", ()))),
        requirement=str(requirement),
        values=values,
        open=bool(raw.get("open", False)),
        applies_if=applies_if,
        unit=unit,
        tolerance=(float(tolerance[0]), float(tolerance[1])),
        threshold=float(raw.get("threshold", 0.85)),
        critical=bool(raw.get("critical", False)),
        groups=groups,
        weight=float(raw.get("weight", 1.0)),
        inferable=bool(raw.get("inferable", True)),
        derive=tuple(derive),
        fields=inner,
        key=key,
    )


_TOLERANCE = ("absolute", "relative")


def _field_values(raw: Any, kind: Any, where: str, problems: list[str]) -> dict[str, tuple[str, ...]]:
    """Allowed values with their synonyms; a list is short for values without synonyms."""
    if kind == "boolean" and isinstance(raw or {}, dict):
        raw = {**BOOLEAN, **(raw or {})}
    if kind not in CODED:
        if raw:
            problems.append(f"{where}: `values` given for the type {kind!r}, which has none")
        return {}
    listed = isinstance(raw, list) and not any(isinstance(v, list | dict | set) for v in raw)
    entries = dict.fromkeys(raw) if listed else raw
    if not isinstance(entries, dict) or not entries:
        problems.append(f"{where}: `values` must list the allowed values, or map each to its synonyms")
        return {}
    if not all(synonyms is None or isinstance(synonyms, (list, tuple)) for synonyms in entries.values()):
        problems.append(f"{where}: the synonyms of a value must be a list")
        return {}
    if any(isinstance(word, bool) for v, synonyms in entries.items() for word in (v, *(synonyms or ()))):
        problems.append(f"{where}: `values` holds a yes/no that YAML reads as true/false; put it in quotes")
    values = {str(v): tuple(map(str, synonyms or ())) for v, synonyms in entries.items()}
    owner: dict[str, str] = {}
    for value, synonyms in values.items():
        for word in (value, *synonyms):
            if owner.setdefault(normalise(word), value) != value:
                problems.append(f"{where}: {word!r} stands for both {owner[normalise(word)]!r} and {value!r}")
    return values
