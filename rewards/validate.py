"""Check rewards and reports before training.

    frugalpath validate --config configs/recipes/<x>.yaml
    frugalpath validate --manifest cases.jsonl --rewards choice synoptic
    frugalpath validate --reports reports.jsonl --protocol biopsy

The first two forms score every gold answer, which must get 1, and answers that a policy could give without seeing the
image: the commonest gold answer, one option for all cases, "not applicable" everywhere, the longest text. If such a
constant scores high, training will exploit the reward. The third form parses report texts with a protocol, writes each
report again, and lists what could not be parsed or was lost. See docs/rewards.md.

Exit status: 0 on success; 2 if a gold answer does not score 1, a report cannot be used, or an argument is invalid.
Rewards with `scores: false`, which only shape training, need not give a gold answer 1.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.envs.case import Case, case_columns, extra_columns
from frugalpath.envs.registry import make_env
from frugalpath.errors import InputError, entry
from frugalpath.files import write_text
from frugalpath.parsing import parse_json, read_yaml
from frugalpath.rewards.registry import RewardFunction, get_rewards, gold_completion
from frugalpath.rewards.synoptic.biopsy import lost_words
from frugalpath.rewards.synoptic.check import check_record
from frugalpath.rewards.synoptic.conditions import UNDETERMINED
from frugalpath.rewards.synoptic.parse import parse_report
from frugalpath.rewards.synoptic.protocol import Protocol, load_protocol
from frugalpath.rewards.synoptic.render import layouts, render_report
from frugalpath.rewards.synoptic.report import Report

SHOWN = 20  # problems printed; the rest are only counted
HIGH = 0.9  # score from which a constant answer is flagged


@dataclass
class ValidateArguments:
    """Command-line arguments."""

    config: str | None = field(default=None, metadata={"help": "recipe whose cases and rewards are checked"})
    manifest: str | None = field(default=None, metadata={"help": "manifest of cases"})
    rewards: list[str] = field(default_factory=list, metadata={"help": "names of the rewards for --manifest"})
    reports: str | None = field(default=None, metadata={"help": "JSON lines file with one report text per line"})
    protocol: str | None = field(default=None, metadata={"help": "protocol of the reports: name or YAML file"})
    column: str = field(default="report", metadata={"help": "key of the report text in each line"})
    sample: int = field(default=0, metadata={"help": "print this many random reports with what was parsed"})
    seed: int = field(default=0, metadata={"help": "random seed of --sample"})
    json: str | None = field(default=None, metadata={"help": "also write the findings to this file"})


@entry
def main() -> None:
    """Run the command line."""
    from transformers import HfArgumentParser  # slow to import, and needed here only

    description = (__doc__ or "").partition("\n")[0]
    parser = HfArgumentParser(ValidateArguments, description=description)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses()
    if sum(v is not None for v in (arguments.config, arguments.manifest, arguments.reports)) != 1:
        raise InputError("give one of --config, --manifest and --reports")
    if arguments.reports is not None:
        if arguments.protocol is None:
            raise InputError("--reports needs --protocol")
        findings = check_reports(read_texts(arguments.reports, arguments.column), load_protocol(arguments.protocol))
        _print_reports(findings)
        _print_sample(arguments)
    else:
        cases, rewards = _cases_and_rewards(arguments)
        findings = check_rewards(cases, rewards)
        _print_rewards(findings)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(findings, indent=1, ensure_ascii=False) + "\n")
    if findings["failed"]:
        sys.exit(2)


def check_rewards(cases: Sequence[Case], rewards: Sequence[RewardFunction]) -> dict[str, Any]:
    """Score the gold answers and constant answers of all cases.

    Returns:
        `n` cases; `rewards`: name -> {`n` rows it applies to, `scores` (whether it counts in the score), `gold` mean,
        `constants`: answer -> mean score}; `problems`: gold answers that do not score 1 and cases that no reward
        scores; `failed`: whether there are any.
    """
    problems: list[str] = []
    results: dict[str, Any] = {}
    scored = np.zeros(len(cases), dtype=bool)
    constants = constant_answers(cases)
    for reward in rewards:
        gold = _scores(reward, cases, [gold_completion({"answer": c.answer}) for c in cases])
        applies = ~np.isnan(gold)
        if reward.score_weight > 0:
            scored |= applies
            problems += [
                f"case {c.id}: its gold answer {c.answer[:80]!r} scores {s:.3f} under {reward.name}, not 1"
                for c, s in zip(cases, gold, strict=True)
                if not np.isnan(s) and abs(s - 1) > 1e-6
            ]
        row: dict[str, Any] = {"n": int(applies.sum()), "scores": reward.score_weight > 0}
        if applies.any():
            row["gold"] = float(gold[applies].mean())
            row["constants"] = {
                name: float(np.nanmean(values))
                for name, texts in constants.items()
                if not np.isnan(values := _scores(reward, cases, [_completion(t) for t in texts])).all()
            }
        results[reward.name] = row
    problems += [
        f"case {c.id}: no reward scores its task {c.task!r}, or the warning above says why"
        for c, ok in zip(cases, scored, strict=True)
        if not ok
    ]
    return {"n": len(cases), "rewards": results, "problems": problems, "failed": bool(problems)}


def constant_answers(cases: Sequence[Case]) -> dict[str, list[str]]:
    """Answers that need no look at the image, by name: one answer for each case."""
    usual: dict[str, str] = {}
    longest: dict[str, str] = {}
    for question in {c.question for c in cases}:
        answers = [c.answer for c in cases if c.question == question]
        usual[question] = Counter(sorted(answers)).most_common(1)[0][0]
        longest[question] = max(sorted(set(answers)), key=len)
    found: dict[str, list[str]] = {
        "nothing": ["" for _ in cases],
        "commonest answer": [usual[c.question] for c in cases],
        "longest answer": [longest[c.question] for c in cases],
        "all answers": [" ".join(c.options or (usual[c.question], longest[c.question])) for c in cases],
        "echo of the question": [c.prompt for c in cases],
    }
    for i in range(max((len(c.options or ()) for c in cases), default=0)):
        found[f"option {i + 1}"] = [c.options[min(i, len(c.options) - 1)] if c.options else "" for c in cases]
    if any(c.task == "detection" for c in cases):
        found["no box"] = ["[]" for _ in cases]
        found["whole image"] = ["[[0, 0, 1000, 1000]]" for _ in cases]
    protocols = {n: load_protocol(n) for n in {c.protocol for c in cases if c.task == "synoptic"} if n is not None}
    if protocols:
        for name, answer in (
            ("all not applicable", lambda f: "not applicable"),
            (f"all {UNDETERMINED}", lambda f: UNDETERMINED),
            ("first value of each field", lambda f: next(iter(f.values), "1")),
            ("all values of each field", lambda f: ", ".join(f.values) or "1"),
        ):
            found[name] = [_filled(protocols.get(c.protocol or ""), answer) for c in cases]
    return found


def check_reports(texts: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    """Read and write again every report of a protocol.

    A report is parsed when every part of it has a place and, where the layout is that of biopsy reports, organ,
    procedure and diagnosis are there. It makes the round trip when reading what was written gives the same record in
    every layout, and no word of it is lost.

    Returns:
        `n`, `unique`, `parsed` and `round_trip` (shares of the rows; `_unique` of the distinct texts); `problems`,
        commonest text first: `{text, n, reasons}`; `contradictions`: what the validator finds wrong with reports that
        were read (a grade that its scores do not give), with the number of reports. `failed` is False: reports are
        data, and the shares say how good.
    """
    counts = Counter(texts)
    contradictions: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    problems = []
    for text, n in counts.most_common():
        report = parse_report(text, protocol)
        reasons, whole = report_problems(text, report, protocol)
        if whole:
            contradictions.update({p: n for p in check_record(report.record, protocol)})
        parsed[text] = n * whole
        kept[text] = n * (not reasons)
        if reasons:
            problems.append({"text": text, "n": n, "reasons": reasons})
    total, unique = max(1, len(texts)), max(1, len(counts))
    return {
        "n": len(texts),
        "unique": len(counts),
        "parsed": parsed.total() / total,
        "round_trip": kept.total() / total,
        "parsed_unique": sum(v > 0 for v in parsed.values()) / unique,
        "round_trip_unique": sum(v > 0 for v in kept.values()) / unique,
        "problems": problems,
        "contradictions": dict(contradictions.most_common()),
        "failed": False,
    }


def report_problems(text: str, report: Report, protocol: Protocol) -> tuple[list[str], bool]:
    """List what is lost between a report, its record and its renderings, and whether it could be parsed."""
    reasons = list(report.problems)
    if protocol.layout == "biopsy":
        reasons += [f"no {name}" for name in ("organ", "procedure", "diagnoses") if name not in report.record]
    whole = not reasons
    for layout in layouts(protocol):
        written = render_report(report.record, protocol, layout)
        again = parse_report(written, protocol)
        if again.record != report.record:
            changed = [k for k in {**report.record, **again.record} if report.record.get(k) != again.record.get(k)]
            reasons.append(f"{layout}: {', '.join(changed)} changed on the round trip")
        if layout == "biopsy" and (lost := lost_words(text, written)):
            reasons.append(f"words without a field: {' '.join(lost)}")
    return reasons, whole


def read_texts(path: str, column: str) -> list[str]:
    """Read one key of every line of a JSON lines file.

    Raises:
        InputError: a line cannot be read; the message names file and line.
    """
    if not Path(path).is_file():
        raise InputError(f"no file {path}")
    texts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = parse_json(line)[column]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}, line {number}: expected a JSON object with the key {column!r}; set another with --column"
            ) from None
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: {column!r}: expected text, got {type(text).__name__}")
        texts.append(text)
    return texts


def _cases_and_rewards(arguments: ValidateArguments) -> tuple[list[Case], list[RewardFunction]]:
    if arguments.manifest is not None:
        if not arguments.rewards:
            raise InputError("--manifest needs --rewards with one or more names")
        return make_env("manifest", {"path": arguments.manifest}), get_rewards(arguments.rewards)
    path = Path(str(arguments.config))
    if not path.is_file():
        raise InputError(f"no recipe {path}")
    try:
        recipe = read_yaml(path)
        params = dict(recipe["cases"])
        specs = recipe["rewards"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: expected a recipe with `cases` and `rewards`: {error!r}") from None
    return make_env(params.pop("name"), params, path.parent), get_rewards(specs, base=path.parent)


def _scores(reward: RewardFunction, cases: Sequence[Case], completions: list[str]) -> np.ndarray:
    """Scores (N,) of a reward, NaN where it does not apply."""
    extra = extra_columns(cases)
    rows = [case_columns(c, extra) for c in cases]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    budget = {"budget": [1] * len(cases), "tokens": [1] * len(cases), "max_budget": [1] * len(cases)}
    # No tokenizer is at hand: bytes stand for the tokens that rewards of length count.
    columns["completion_ids"] = [list(text.encode()) for text in completions]
    return np.array([np.nan if v is None else v for v in reward(completions, **{**budget, **columns})], dtype=float)


def _completion(text: str) -> str:
    return gold_completion({"answer": text}) if text else ""


def _filled(protocol: Protocol | None, answer: Callable[[Any], str]) -> str:
    if protocol is None:
        return ""
    return "\n".join(f"{f.name}: {answer(f)}" for f in protocol.fields if f.type != "list")


def _print_rewards(findings: Mapping[str, Any]) -> None:
    print(f"{findings['n']} cases")
    for name, row in findings["rewards"].items():
        print(f"\n{name}: applies to {row['n']}{'' if row['scores'] else ', shapes training only'}")
        if "gold" in row:
            print(f"  {'gold answer':<36}{row['gold']:.3f}")
        for constant, score in sorted(row.get("constants", {}).items(), key=lambda item: -item[1]):
            mark = "  <- scores high without the image" if score >= HIGH and row["scores"] else ""
            print(f"  {constant:<36}{score:.3f}{mark}")
    _print_problems(findings["problems"])


def _print_reports(findings: Mapping[str, Any]) -> None:
    print(f"{findings['n']} reports, {findings['unique']} texts")
    print(f"parsed:     {findings['parsed']:.2%} of the reports, {findings['parsed_unique']:.2%} of the texts")
    print(f"round trip: {findings['round_trip']:.2%} of the reports, {findings['round_trip_unique']:.2%} of the texts")
    for problem, n in findings["contradictions"].items():
        print(f"contradiction in {n}: {problem}")
    _print_problems(
        [f"{p['n']} x {' '.join(p['text'].split())!r}: {'; '.join(p['reasons'])}" for p in findings["problems"]]
    )


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"error: and {len(problems) - SHOWN} more", file=sys.stderr)


def _print_sample(arguments: ValidateArguments) -> None:
    """Print random reports next to what was parsed from them, for manual inspection."""
    texts = sorted(set(read_texts(str(arguments.reports), arguments.column)))
    protocol = load_protocol(str(arguments.protocol))
    for text in random.Random(arguments.seed).sample(texts, min(arguments.sample, len(texts))):
        print(f"\n{text.strip()}\n{'-' * 20}\n{render_report(parse_report(text, protocol).record, protocol)}")


if __name__ == "__main__":
    main()
