"""The free layout of biopsy reports as they are signed out, read into the fields of the protocol `biopsy` and back.

    Breast, core-needle biopsy;
      1. Invasive carcinoma of no special type, grade II (Tubule formation: 3, Nuclear grade: 2, Mitoses: 1)
      2. Ductal carcinoma in situ
      - Type: Solid
      - Nuclear grade: High
    Note) ...

A head of organ and procedure, one diagnosis or numbered ones, each with particulars in brackets, behind commas, after
"with" or on lines of their own, and notes. The particulars are taken out by their wording; what is left is the
diagnosis, so that one that was never seen is read like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rapidfuzz import fuzz, process

from frugalpath.rewards.label import normalise
from frugalpath.rewards.synoptic.protocol import Field, Protocol
from frugalpath.rewards.synoptic.report import Report, split_outside
from frugalpath.rewards.synoptic.values import Unreadable, clean, number_text, read_value

TYPO = 90  # least rapidfuzz ratio at which a word of six letters or more is a misspelt value
WORD_TYPO = 88  # least ratio of each of its words
MAX_ITEMS = 30
MAX_FINDINGS = 4_000  # characters of the diagnoses of a report

_NOTE = re.compile(r"(?im)^[ \t]*(?:note|comment|addendum)s?[ \t]*[):.]+[ \t]*")
_MARK = re.compile(r"(?:^|(?<=\s))([0-9]{1,2})([.)])[ \t]*(?=\S)")
_DASH = re.compile(r"(?m)^[ \t]*[-•*][ \t]*")
_PROCEDURE = re.compile(
    r"(?i)biops|resection|ectomy|dissection|excision|procedure|curettage|aspirat|scraping|conization|punch|smear|cytolog"
)
_MUSCLE = re.compile(
    r"(?i)the specimen (includes|does not include|contains|does not contain) (?:the )?"
    r"(?:muscle proper|proper muscle|muscularis propria)\s*\.?"
)
_SECOND_HEAD = re.compile(
    rf"(?m)^(?=[^;\n]{{0,200}}(?:{_PROCEDURE.pattern.removeprefix('(?i)')}))[^;,\n]+,[^;\n]+;[ \t]*$", re.I
)
_PART = re.compile(r"[A-Z][.)]\s+")
_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4"}

# What each particular looks like; the groups are its values. Order matters: the first takes its text away.
_TAKE: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (fields, re.compile(pattern, re.IGNORECASE))
    for fields, pattern in (
        (("gleason_score", "gleason_primary", "gleason_secondary"),
         r",?\s*gleason(?:['’`]?s)?(?: score)?:?\s*([0-9]{1,2})\s*\(\s*([1-5])\s*\+\s*([1-5])\s*\)"),
        (("gleason_primary", "gleason_secondary", "gleason_score"),
         r",?\s*gleason(?:['’`]?s)?(?: score)?:?\s*([1-5])\s*\+\s*([1-5])(?:\s*=\s*([0-9]{1,2}))?"),
        (("grade_group",), r",?\s*(?:isup )?grade group:?\s*([1-5])"),
        (("pattern_4",), r"[,(]{0,2}\s*gleason pattern 4:?\s*([<>]?\s*[0-9.]+)\s*%"),
        (("pattern_5",), r"[,(]{0,2}\s*gleason pattern 5:?\s*([<>]?\s*[0-9.]+)\s*%"),
        (("tumour_volume",), r",?\s*tumou?r volume:?\s*([<>]?\s*[0-9.]+)\s*%"),
        (("tubule_score",), r"[,(]?\s*tubul(?:e|ar) (?:formation|differentiation):?\s*([1-3])\b"),
        (("nuclear_score",), r"[,(]?\s*nuclear (?:grade|pleomorphism):?\s*([1-3])\b"),
        (("mitotic_score",), r"[,(]?\s*(?:mitos[ei]s|mitotic (?:count|rate|activity)):?\s*([1-3])\b"),
        (("cin",), r"[;,(]?\s*\bCIN[ -]?([1-3]|I{1,3})\b"),
        (("certainty", "grade"), r",?\s*\b(probably )?(?:histologic |nottingham )?grade\s*(I{1,3}|IV|[1-4])\b"),
        (("grade",), r",?\s*\bG([1-4])\b"),
        (("differentiation",), r",?\s*\b((?:(?:well|moderately|poorly) to )?(?:well|moderately|poorly)[ -]"
         r"differentiated"
         r"|undifferentiated(?=\s*(?:,|$)))"),
        (("dysplasia",), r",?\s*\bwith (low|high|indefinite)[ -](?:grade|for) dysplasia"),
        (("tier",), r",\s*(low|high)[ -]grade\b(?! dysplasia)"),
        (("hpv",), r",?\s*\bHPV[ -](associated|independent)\b"),
        (("favours",), r",\s*favou?r(?:s|ing)? ([^,()]+)"),
        (("subtype",), r",\s*([^,()]+ type)\b(?=\s*(?:,|\(|with|$))"),
    )
)  # fmt: skip
_NOS = re.compile(r"(?i),\s*(?:not o?t?herwise specified|NOS)\b")


def parse_biopsy(text: str, protocol: Protocol) -> Report:
    """Read a biopsy report; what has no place in a record is returned in `unknown`."""
    report = Report()
    body, *notes = _NOTE.split(text.replace("\r\n", "\n"))
    head, semicolon, findings = _head(body)
    if semicolon:
        _read_head(head, protocol, report)
    else:
        findings = body
    if second := _SECOND_HEAD.search(findings):  # of another specimen, for which a record has no place
        report.unknown.append(clean(findings[second.start() :]))
        findings = findings[: second.start()]
    if len(findings) > MAX_FINDINGS:
        report.unknown.append(f"{clean(findings[:40])}... (longer than {MAX_FINDINGS} characters)")
        findings = ""
    diagnoses = protocol.by_id["diagnoses"]
    entries = []
    for item in _items(findings):
        entry = _entry(item, diagnoses, report)
        if entry:
            entries.append(entry)
    if entries:
        report.record["diagnoses"] = entries
    if _has_component(entries):
        report.record["in_situ_component"] = "present"
    rest = []
    for note in notes:
        if found := _MUSCLE.search(note):
            report.record["muscularis_propria"] = "not identified" if "not" in found[1].lower() else "present"
            note = _MUSCLE.sub("", note, count=1)
        rest += [clean(note)] if clean(note).strip(" .") else []
    if rest:
        report.record["notes"] = " ".join(rest)
    report.record = protocol.ordered(report.record)
    return report


def render_biopsy(record: Mapping[str, Any], protocol: Protocol) -> str:
    """A record in the free layout."""
    head = [
        _shown(record[name]) if i == 0 else record[name]
        for i, name in enumerate(("organ", "site", "procedure"))
        if record.get(name)
    ]
    lines = [f"{', '.join(head)};"] if head else []
    entries = record.get("diagnoses") or []
    for number, entry in enumerate(entries, start=1):
        first, *more = _item_lines(entry)
        lines += [f"  {f'{number}. ' if len(entries) > 1 else ''}{first}", *(f"  - {line}" for line in more)]
    notes = {
        "present": "The specimen includes muscle proper.",
        "not identified": "The specimen does not include muscle proper.",
    }
    for note in (notes.get(record.get("muscularis_propria", "")), record.get("notes")):
        if note:
            lines += ["", f"Note) {note}"]
    return "\n".join(lines)


def lost_words(text: str, rendered: str) -> list[str]:
    """Words of a report that its rendering lacks, spelling and numbering aside: what the record did not keep."""
    have = _words(rendered)
    return [
        w
        for w in _words(text)
        if w not in have and not process.extractOne(w, have, scorer=fuzz.ratio, score_cutoff=75)
    ]


def _words(text: str) -> list[str]:
    text = _MARK.sub(" ", normalise(text))
    words = re.findall(r"[^\W_]+", re.sub(r"\bnote\)", " ", text))
    return [_ROMAN.get(w, w.removeprefix("g") if w[1:].isdigit() else w) for w in words if w not in _FILLING]


# Words of fixed phrases, which a field stands for.
_FILLING = {
    "the", "specimen", "includes", "include", "contains", "contain", "muscle", "proper", "muscularis", "propria", "a",
    "score", "gleasons", "gleason", "s", "nos", "not", "otherwise", "specified", "and",
}  # fmt: skip


def _head(body: str) -> tuple[str, str, str]:
    """Head, its semicolon and the rest. A semicolon inside brackets, or behind a diagnosis, ends no head."""
    parts = split_outside(body, ";")
    if len(parts) < 2 or len(parts[0]) > 200 or re.search(r"(?m)^\s*1[.)]", parts[0]):
        first, newline, rest = body.strip().partition("\n")
        if newline and _PROCEDURE.search(first) and "," in first:
            return first.strip(" :,."), ";", rest
        head, colon, rest = body.strip().partition(":")
        if colon and "," in head and len(head) <= 200 and "\n" not in head and _PROCEDURE.search(head):
            return head, colon, rest
        return "", "", body
    at = body.index(";", len(body) - len(body.lstrip()) + len(parts[0]))
    return parts[0], ";", body[at + 1 :]


def _read_head(head: str, protocol: Protocol, report: Report) -> None:
    parts = [clean(part) for part in _PART.sub("", head.strip(), count=1).split(",") if part.strip()]
    found: dict[str, str] = {}
    procedure = [part for part in parts if _PROCEDURE.search(part)]
    places = [part for part in parts if part not in procedure]
    if not procedure and len(places) > 1:
        procedure = [places.pop()]
    if places:
        found["organ"] = places[0]
    if places[1:]:
        found["site"] = ", ".join(places[1:])
    if procedure:
        found["procedure"] = ", ".join(procedure)
    for name, text in found.items():
        try:
            report.record[name] = _spelt(protocol.by_id[name], text)
        except Unreadable as error:
            report.unreadable[name] = str(error)


def _items(text: str) -> list[str]:
    """Numbered diagnoses, or the one that is not numbered; `1) 2)` inside a diagnosis belong to it."""
    text = text.strip().strip(";").strip()
    start = _MARK.match(text)
    if start is None or start[1] != "1":
        return [text] if text else []
    cuts, expected = [], 1
    for mark in _MARK.finditer(text):
        # A number may have been skipped, but only at the start of a line: elsewhere it would be part of the text.
        begins = not text[text.rfind("\n", 0, mark.start()) + 1 : mark.start()].strip()
        number = int(mark[1])
        if mark[2] == start[2] and (number == expected or (begins and number > expected)):
            cuts.append((mark.start(), mark.end()))
            expected = number + 1
    ends = [begin for begin, _ in cuts[1:]] + [len(text)]
    return [text[end:stop].strip() for (_, end), stop in zip(cuts, ends, strict=True)][:MAX_ITEMS]


def _entry(item: str, field: Field, report: Report) -> dict[str, Any]:
    """Fields of one diagnosis."""
    raw: dict[str, str] = {}
    text, *lines = _DASH.split(item.lstrip(" \t\n-•*"))
    remarks = []
    for line in lines:
        name, colon, value = line.partition(":")
        inner = field.inner.get(normalise(name)) if colon else None
        if inner is not None and inner.id not in raw:
            raw[inner.id] = clean(value)
        elif clean(line):
            remarks.append(clean(line))
    text = _particulars(clean(text), raw)
    name, remark = _name_and_rest(text, raw)
    if not re.search(r"[^\W\d_]{3}", name):
        report.unknown.append(clean(item))
        return {}
    raw["diagnosis"] = name
    if remark or remarks:
        raw["remarks"] = "; ".join([*remark, *remarks])
    entry: dict[str, Any] = {}
    for inner in field.fields:
        if inner.id in raw:
            try:
                entry[inner.id] = _spelt(inner, raw[inner.id])
            except Unreadable as error:
                report.unknown.append(str(error))
    if entry.get("diagnosis") is None:  # unreadable, or "not applicable"
        report.unknown.append(clean(item))
        return {}
    return entry


def _particulars(text: str, raw: dict[str, str]) -> str:
    """Take out of a diagnosis what the patterns know; empty brackets and doubled commas that stay behind go too."""
    for names, pattern in _TAKE:
        match = pattern.search(text)
        if match is None or any(n in raw for n, v in zip(names, match.groups(), strict=False) if v):
            continue
        values = [v for v in match.groups() if v] if len(names) == 1 else match.groups()
        raw |= {n: clean(_ROMAN.get(v.lower().strip(), v)) for n, v in zip(names, values, strict=False) if v}
        gap = " (" if match[0].lstrip(" ,").startswith("(") else " "
        text = text[: match.start()] + gap + text[match.end() :]
    if match := _NOS.search(text):
        raw.setdefault("subtype", "not otherwise specified")
        text = text[: match.start()] + text[match.end() :]
    # White space is made single first: a pattern that starts with much of it would take quadratic time.
    text = re.sub(r"\( ?[,;]? ?", "(", clean(text))
    text = clean(re.sub(r" ?[,;]? ?\)", ")", clean(re.sub(r"\( ?\)", " ", text))))
    text = clean(re.sub(r"\( ?(?=$|,)", " ", text))
    return clean(re.sub(r" ,", ",", re.sub(r"\) ?\)", ")", clean(re.sub(r"(?<![\w)])\)", "", text)))))


def _name_and_rest(text: str, raw: dict[str, str]) -> tuple[str, list[str]]:
    """The diagnosis itself, and what stands behind commas; brackets, "with" and "involvement of" go to `raw`."""
    brackets = re.findall(r"\(([^()]+)\)", text)
    if brackets:
        raw["abbreviation"] = "; ".join(clean(b) for b in brackets)
        text = clean(re.sub(r"\s*\([^()]+\)", "", text))
    text = text.strip(" ,;.")
    head, found, tail = _with(text)
    if found:
        listed = [clean(p).strip(" ,;.") for p in re.split(r"(?:^|(?<=\s))[0-9]\)\s*", tail) if clean(p).strip(" ,;.")]
        involved = [p for p in listed if p.lower().startswith("involvement of ")]
        if involved:
            raw["invasion"] = involved[0][len("involvement of ") :]
            listed.remove(involved[0])
        if listed:
            raw["with_findings"] = ", ".join(listed)
    name, *rest = [clean(part) for part in head.split(",")]
    return name, [part for part in rest if part]


def _with(text: str) -> tuple[str, bool, str]:
    match = re.search(r",?(?<!consistent)(?<!compatible)(?<!associated)\s+with\s+", text, re.IGNORECASE)
    if match is None:
        return text, False, ""
    return text[: match.start()], True, text[match.end() :]


def _spelt(field: Field, text: str) -> Any:
    """The value of a field, a misspelt one mended where one listed value alone is near; open ones lose a capital."""
    try:
        value = read_value(field, text)
    except Unreadable:
        value = None
    if field.values and not (isinstance(value, list) or value in field.values):
        near = process.extractOne(normalise(text), list(field.lookup), scorer=fuzz.ratio, score_cutoff=TYPO)
        if near is not None and len(near[0]) > 5 and _same_words(near[0], text):
            return field.lookup[near[0]]
    if value is None:
        value = read_value(field, text)
    return _lowered(value) if isinstance(value, str) and (field.open or field.type == "text") else value


def _same_words(value: str, text: str) -> bool:
    """Whether two texts are alike word for word: `non-invasive` is no misspelling of `invasive`."""
    a, b = (re.findall(r"[^\W_]+", normalise(side)) for side in (value, text))
    return len(a) == len(b) and all(x == y or fuzz.ratio(x, y) >= WORD_TYPO for x, y in zip(a, b, strict=True))


def _lowered(text: str) -> str:
    return (
        text[0].lower() + text[1:]
        if len(text) > 1 and text[0].isupper() and (text[1].islower() or text[1] == " ")
        else text
    )


def _shown(text: str) -> str:
    return text[:1].upper() + text[1:]


def _has_component(entries: list[dict[str, Any]]) -> bool:
    """Whether an in-situ carcinoma stands beside an invasive one."""
    names = [normalise(entry["diagnosis"]) for entry in entries]
    in_situ = [name for name in names if "in situ" in name]
    return bool(in_situ) and any(
        "in situ" not in n and ("carcinoma" in n or "invasive" in n) and "non-invasive" not in n for n in names
    )


_LINES = {"architecture": "Type", "nuclear_grade": "Nuclear grade", "necrosis": "Necrosis"}


def _item_lines(entry: Mapping[str, Any]) -> list[str]:
    """First line of a diagnosis and its dash lines."""
    get = entry.get
    text = _shown(entry["diagnosis"])
    scores = [
        f"{label}: {get(name)}"
        for name, label in (
            ("tubule_score", "Tubule formation"),
            ("nuclear_score", "Nuclear grade"),
            ("mitotic_score", "Mitoses"),
        )
        if get(name) is not None
    ]
    if get("gleason_primary"):
        score = get("gleason_score") or int(entry["gleason_primary"]) + int(entry["gleason_secondary"])
        text += f", Gleason's score {score} ({entry['gleason_primary']}+{entry['gleason_secondary']})"
    if get("grade_group"):
        text += f", grade group {entry['grade_group']}"
    patterns = [
        f"Gleason pattern {n}: {_percent(entry[f'pattern_{n}'])}" for n in (4, 5) if get(f"pattern_{n}") is not None
    ]
    text += f" ({', '.join(patterns)})" if patterns else ""
    if get("tumour_volume") is not None:
        text += f", tumor volume: {_percent(entry['tumour_volume'])}"
    for name, before, after in (
        ("differentiation", ", ", ""),
        ("tier", ", ", " grade"),
        ("hpv", ", HPV-", ""),
        ("subtype", ", ", ""),
        ("favours", ", favor ", ""),
    ):
        if get(name):
            text += f"{before}{entry[name]}{after}"
    if get("grade"):
        text += f", {'probably ' if get('certainty') else ''}grade {entry['grade']}"
    text += f" ({', '.join(scores)})" if scores else ""
    short = [x for x in (get("abbreviation"), f"CIN {entry['cin']}" if get("cin") else None) if x]
    text += f" ({'; '.join(short)})" if short else ""
    text += "".join(f", {r}" for r in (get("remarks") or "").split("; ") if r)
    if get("dysplasia"):
        text += (
            f" with {entry['dysplasia']} grade dysplasia"
            if entry["dysplasia"] != "indefinite"
            else " with indefinite for dysplasia"
        )
    others = [f"involvement of {entry['invasion']}"] if get("invasion") else []
    others += get("with_findings") or []
    if others:
        text += ", with " + (others[0] if len(others) == 1 else " ".join(f"{i}) {o}" for i, o in enumerate(others, 1)))
    lines = []
    for name, label in _LINES.items():
        if get(name):
            value = entry[name]
            lines.append(f"{label}: {_shown(' and '.join(value) if isinstance(value, list) else value)}")
    return [text, *lines]


def _percent(value: Any) -> str:
    return f"{value if isinstance(value, str) else number_text(value)}%"
