"""A finished run that meets new cases: nothing is trained, and the recipe's own cases need not be there.

Answers of a finished run: one case after another, what each cost, and the means of all.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frugalpath.allocator.base import Answered, Decider
from frugalpath.allocator.forms import KEPT, kept_form, load_decider
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.performer import Performer
from frugalpath.recipe.checkpoints import DONE
from frugalpath.recipe.data import load_features
from frugalpath.recipe.run import Run
from frugalpath.rewards.answer import extract_answer
from frugalpath.rewards.label import find_option, read_options
from frugalpath.rewards.scoring import Scorer
from frugalpath.rl.stages import Stages

TRAINED = f"grpo/{DONE}"
NEEDED = {TRAINED: "rl/grpo.py", f"allocator/{KEPT}": "rl/pareto.py"}
"""Last file of each part that answering takes, and what writes it."""
SUMMARY = "report/summary.json"
MARK = "frugalpath.json"
"""File that makes a folder a published run, with the settings that it was trained by; see `frugalpath.deploy.publishing`."""
EVALUATION = "evaluation.json"
"""What a published run has of its report."""


class Deployed(Stages):
    """A finished run and new cases.

    Args:
        run: the parsed recipe.
        cases: to be answered, at least one.
        features: folder that features are read from and written to.

    Raises:
        InputError: the run is not finished, or the recipe is not the one it was made by.
    """

    # Not that of `Stages`, which loads the recipe's cases and rewards.
    def __init__(self, run: Run, cases: Sequence[Case], features: Path):
        check_finished(run)
        self.run, self.cases = run, list(cases)
        self.all_splits = self.splits = {"train": [], "val": [], "test": []}
        self.max_new_tokens = run.evaluation.max_new_tokens or run.grpo.max_completion_length
        self.bank = load_features(self.cases, run.encoder, features)
        self.features = features

    def show(self, cases: Sequence[Case]) -> None:
        """Make further cases known, which a decider that is loaded already can then answer."""
        self.bank.add(load_features(cases, self.run.encoder, self.features))

    def rung_cost(self, performer: Performer) -> list[float]:
        """As it was when the allocator was fitted."""
        return json.loads((self.run.folder / "allocator" / KEPT).read_text())["rung_cost"]

    def decider(self) -> Decider:
        """Performer and allocator, ready to answer."""
        return load_decider(self, self._load("grpo"))

    def _load(self, name: str) -> Performer:
        # A published run has the performer at its top, where `from_pretrained` looks for it.
        return super()._load("" if (self.run.folder / MARK).is_file() else name)


def settings(run: Run) -> dict[str, Any]:
    """What the trained weights can only be used with."""
    return {"encoder": vars(run.encoder), "performer": dataclasses.asdict(run.performer), "ladder": run.ladder}


def check_finished(run: Run) -> None:
    """Refuse a run that has no trained performer and fitted allocator, or that other settings have made or reported.

    Raises:
        InputError: with what is missing and what writes it, or what differs.
    """
    if (run.folder / MARK).is_file():
        _check_settings(run, json.loads((run.folder / MARK).read_text())["parts"])
    else:
        _check_files(run, NEEDED)
        _check_settings(run, json.loads((run.folder / "grpo" / DONE).read_text())["parts"])
    kept_form(run)


def check_trained(run: Run) -> None:
    """Refuse a run whose training is not finished, which its report does not do for it.

    Raises:
        InputError: with what is missing and what writes it.
    """
    _check_files(run, {TRAINED: NEEDED[TRAINED]})


def _check_files(run: Run, needed: Mapping[str, str]) -> None:
    missing = {name: script for name, script in needed.items() if not (run.folder / name).is_file()}
    if missing:
        script = NEEDED[TRAINED] if TRAINED in missing else next(iter(missing.values()))
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{run.folder}: the run is not finished, it has no {', '.join(missing)}; run: python {script} {recipe}"
        )


def _check_settings(run: Run, kept: dict[str, Any]) -> None:
    changed = [name for key, value in settings(run).items() for name in _differing(key, kept[key], value)]
    if changed:
        raise InputError(
            f"{run.folder}: was trained with other settings ({', '.join(changed)}); answer with the recipe it was "
            "trained by"
        )


def evaluation(run: Run) -> dict[str, Any]:
    """What the run's report, or a published run, tells of it; empty where there is no report."""
    path = run.folder / (EVALUATION if (run.folder / MARK).is_file() else SUMMARY)
    return json.loads(path.read_text()) if path.is_file() else {}


def operating_price(run: Run) -> float:
    """The price that the run's report chose.

    Raises:
        InputError: there is no report.
    """
    found = evaluation(run)
    if not found:
        recipe = f"--config {run.path}" if run.path else "--config RECIPE"
        raise InputError(
            f"{run.folder / SUMMARY}: there is no report to take the price from; give --price or --budget, or run: "
            f"python rl/pareto.py {recipe}"
        )
    return found["headline"]["price"]


def _differing(key: str, before: Any, now: Any) -> list[str]:
    """Keys of a part of the recipe that are not as they were; where features lie does not matter."""
    if not isinstance(before, dict):
        return [key] if before != json.loads(json.dumps(now)) else []
    same = json.loads(json.dumps(now))
    return [f"{key}.{k}" for k in before if k not in ("folder", "strict") and same.get(k) != before[k]]


HEAD = ("budget", "tokens", "prompt", "written", "flops 1", "flops 2", "ms 1", "ms 2", "conf.", "looks")
"""Columns of the text form before the case and its answer; 1 is the look, 2 the answer."""


def answer_all(
    decider: Decider,
    cases: Sequence[Case],
    *,
    price: float | None = None,
    budget: int | None = None,
    scorer: Scorer | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for each case, answered alone.

    Args:
        price: lambda at which the allocator chooses, or `budget`: the same tokens for all.
        scorer: scores the answers to cases with a gold answer.
    """
    # The first pass of a model is slow for reasons of its own; it sees no image, so that no case is known before.
    decider.performer.answer(cases[:1], [0], decider.stages.max_new_tokens, 1)
    for case in cases:
        if budget is not None:
            answered = decider.answer_at(case, budget)
        else:
            assert price is not None
            answered = decider.answer(case, price)
        found = _row(case, answered)
        if scorer is not None and case.answer.strip():
            (score,) = scorer([answered.text], [case], [found["budget"]], [answered.visual])
            found["score"] = float(score)
        yield found


def _row(case: Case, answered: Answered) -> dict[str, Any]:
    return {
        "id": case.id,
        "question": case.question,
        "answer": extract_answer(answered.text),
        "completion": answered.text,
        "budget": answered.budget,
        "looks": list(answered.looks),
        "tokens": answered.visual,
        "prompt_tokens": answered.prompt,
        "generated_tokens": answered.generated,
        "flops_stage1": answered.look_flops,
        "flops_stage2": answered.flops,
        "latency_ms_stage1": round(answered.look_ms, 3),
        "latency_ms_stage2": round(answered.ms, 3),
        "confidence": answered.confidence,
    }


def not_an_option(row: Mapping[str, Any], case: Case) -> str | None:
    """What is said of an answer that names none of the case's options."""
    if not case.options or row["answer"] is None:
        return None
    known = read_options(case.options)
    if known is None or find_option(row["answer"], known) is not None:
        return None
    return f"the answer {row['answer']!r} is none of the options {', '.join(case.options)}"


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the rows; `score` over those that have one, `flops` of both stages, `budgets` how often each."""
    scores = [row["score"] for row in rows if "score" in row]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in ("tokens", "flops_stage1", "flops_stage2")}
    return {
        "n": len(rows),
        "scored": len(scores),
        "score": float(np.mean(scores)) if scores else None,
        "tokens": mean["tokens"],
        "flops": mean["flops_stage1"] + mean["flops_stage2"],
        "flops_stage1": mean["flops_stage1"],
        "latency_ms_stage1": float(np.mean([row["latency_ms_stage1"] for row in rows])),
        "latency_ms_stage2": float(np.mean([row["latency_ms_stage2"] for row in rows])),
        "budgets": {str(b): n for b, n in sorted(Counter(row["budget"] for row in rows).items())},
    }


def head() -> str:
    """First line of the text form."""
    return "".join(f"{name:>9s}" for name in HEAD) + "  case: answer"


def line(row: dict[str, Any]) -> str:
    """A row as text; an answer of several lines becomes one."""
    numbers = [
        f"{row['budget']:d}",
        f"{row['tokens']:d}",
        f"{row['prompt_tokens']:d}",
        f"{row['generated_tokens']:d}",
        f"{row['flops_stage1']:.2e}",
        f"{row['flops_stage2']:.2e}",
        f"{row['latency_ms_stage1']:.1f}",
        f"{row['latency_ms_stage2']:.1f}",
        f"{row['confidence']:.3f}",
        f"{len(row['looks'])}",
    ]
    answer = row["answer"] if row["answer"] is not None else f"no answer in {row['completion']!r}"
    score = f"  (score {row['score']:.3f})" if "score" in row else ""
    return "".join(f"{text:>9s}" for text in numbers) + f"  {row['id']}: {' '.join(answer.split())}{score}"


def closing(found: dict[str, Any]) -> str:
    """Means as text."""
    score = f"mean score {found['score']:.4f} of {found['scored']}" if found["scored"] else "no gold answers, no score"
    budgets = ", ".join(f"{budget}: {count}" for budget, count in found["budgets"].items())
    return (
        f"{found['n']} cases, {score}; in the mean {found['tokens']:.1f} tokens, {found['flops']:.3e} FLOPs "
        f"({found['flops_stage1']:.2e} to look), {found['latency_ms_stage1']:.1f} ms to look and "
        f"{found['latency_ms_stage2']:.1f} ms to answer; cases by budget {budgets}"
    )
