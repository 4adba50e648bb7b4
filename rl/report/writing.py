"""Write the report of a run: summary.json, cases.jsonl and pareto.png."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from envs.case import Case
from rl.checkpoints import is_done
from rl.prepare import cases_of
from rl.report.picture import plot
from slides.whole import write_text

if TYPE_CHECKING:
    from rl.pareto import Evaluation
    from rl.stages import Stages

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "openslide-python")


def write_report(stages: Stages, evaluation: Evaluation) -> dict[str, Any]:
    """Write `report/` of the run's folder and return the summary."""
    joint = is_done(stages.run.folder / "grpo", stages.grpo_parts()) or {}
    found = evaluation.summary()
    summary = {
        **found,
        "warnings": [*joint.get("warnings", []), *found["warnings"]],
        "missing_slides": missing_slides(stages.cases, stages.bank.missing),
        "price_unit": "score per cost of the largest budget",
        "ladder": stages.run.ladder,
        "splits": {s: len(members) for s, members in stages.splits.items()},
        "seed": stages.run.grpo.seed,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git": _revision(),
        "command": _command(),
    }
    if PartialState().is_main_process:
        folder = stages.run.folder / "report"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_text(folder / "cases.jsonl", _cases(evaluation))
        plot(summary, folder / "pareto.png")
    return summary


def missing_slides(cases: Sequence[Case], missing: Mapping[str, str]) -> list[dict[str, Any]]:
    """Slides that gave no features: `slide`, `reason`, and the number of `cases` that went on without it."""
    count = cases_of(cases, missing)
    return [{"slide": slide, "reason": reason, "cases": count[slide]} for slide, reason in missing.items()]


def _cases(evaluation: Evaluation) -> str:
    test, decisions = evaluation.test, evaluation.decisions
    predicted = evaluation.decider.predicted("test")
    lines = []
    for i, case in enumerate(evaluation.stages.splits["test"]):
        k = test.budgets.index(evaluation.ladder[decisions.rungs[i]])
        row = {
            "id": case.id,
            "patient": case.patient,
            "question": case.question,
            "answer": case.answer,
            "budget": test.budgets[k],
            "completion": test.text[i][k],
            "score": float(decisions.score[i]),
            "tokens": int(decisions.visual[i]),
            "prompt_tokens": int(test.prompt[i, k]),
            "generated_tokens": int(test.generated[i, k]),
            "flops": float(decisions.cost[i]),
            "score_by_budget": {str(b): float(test.score[i, j]) for j, b in enumerate(test.budgets)},
        }
        if predicted is not None:
            values = zip(evaluation.ladder, predicted[i], strict=True)
            row["predicted"] = {str(b): round(float(v), 4) for b, v in values}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def _revision() -> str | None:
    """Revision of the sources, with a mark when they were changed since; None outside a git checkout."""
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    processes = PartialState().num_processes
    return f"accelerate launch --num_processes {processes} {' '.join(sys.argv)}"
