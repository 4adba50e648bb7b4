"""Answer new cases with a trained run: one case after another, what each cost, and the means.

Nothing is trained, and the recipe's own cases are not needed.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from frugalpath.allocator.base import Allocator, Answered
from frugalpath.allocator.forms import load_allocator
from frugalpath.envs.case import Case
from frugalpath.models.build import load_performer
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.models.performer import Performer
from frugalpath.recipe.data import RunData
from frugalpath.recipe.finished import MARK, check_finished
from frugalpath.recipe.run import Run
from frugalpath.rewards.answer import extract_answer
from frugalpath.rewards.label import find_option, read_options
from frugalpath.rewards.scoring import Scorer


def deployed(run: Run, cases: Sequence[Case], features: Path) -> Allocator:
    """Load the performer and allocator of a trained run to answer new cases.

    Args:
        run: the parsed recipe.
        cases: those known so far.
        features: folder of the feature cache.

    Raises:
        InputError: the run is not finished, or the recipe is not the one it was made by.
    """
    check_finished(run)
    data = RunData(run, {"train": [], "val": [], "test": list(cases)}, features=features)
    return load_allocator(data, trained_performer(run, data.bank))


def trained_performer(run: Run, bank: FeatureBank) -> Performer:
    """The performer of a finished or published run, where the run computes; `bank` as for `load_performer`."""
    # A published run has the performer at its top, where `from_pretrained` looks for it.
    folder = run.folder if (run.folder / MARK).is_file() else run.folder / "grpo"
    performer = load_performer(folder, run.performer, bank)
    performer.model.to(PartialState().device)
    return performer


def feature_folder(run: Run, stack: ExitStack) -> Path:
    """Where features of new cases go: the run's folder of them, or a temporary one where that may not be written."""
    folder = run.feature_folder
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="features-")))


HEAD = ("budget", "tokens", "prompt", "written", "flops 1", "flops 2", "ms 1", "ms 2", "conf.", "looks")
"""Columns of the text output before the case and its answer; 1 is the probe, 2 the answer."""


def answer_all(
    decider: Allocator,
    cases: Sequence[Case],
    *,
    price: float | None = None,
    budget: int | None = None,
    scorer: Scorer | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer each case alone and yield its row.

    Args:
        price: lambda of the allocator; with `budget` instead, all cases get the same number of tokens.
        scorer: scores the answers to cases with a gold answer.
    """
    # The first pass of a model is slow for reasons of its own; it sees no image, so that no case is known before.
    decider.performer.answer(cases[:1], [0], decider.data.max_new_tokens, 1)
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
    """Warn of an answer that is not one of the case's options."""
    if not case.options or row["answer"] is None:
        return None
    known = read_options(case.options)
    if known is None or find_option(row["answer"], known) is not None:
        return None
    return f"the answer {row['answer']!r} is not one of the options {', '.join(case.options)}"


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the rows: `score` over those that have one, `flops` of both stages, `budgets` as counts."""
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
    """Header of the text output."""
    return "".join(f"{name:>9s}" for name in HEAD) + "  case: answer"


def line(row: dict[str, Any]) -> str:
    """Format a row as one line of text."""
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
    """Format the means as text."""
    score = f"mean score {found['score']:.4f} of {found['scored']}" if found["scored"] else "no gold answers, no score"
    budgets = ", ".join(f"{budget}: {count}" for budget, count in found["budgets"].items())
    return (
        f"{found['n']} cases, {score}; mean per case: {found['tokens']:.1f} tokens, {found['flops']:.3e} FLOPs "
        f"({found['flops_stage1']:.2e} for the probe), {found['latency_ms_stage1']:.1f} ms for the probe and "
        f"{found['latency_ms_stage2']:.1f} ms for the answer; cases by budget {budgets}"
    )
