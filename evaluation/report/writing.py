"""Write the report of a run: summary.json, cases.jsonl, pareto.png and report.html."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from frugalpath.envs.case import Case
from frugalpath.evaluation.report.examples import question_examples
from frugalpath.evaluation.report.figures import plot
from frugalpath.evaluation.report.page import Pictured, write_page
from frugalpath.evaluation.report.pictures import Pictures
from frugalpath.files import write_text
from frugalpath.models.performer import Performer
from frugalpath.recipe.cache_key import grpo_key
from frugalpath.recipe.checkpoints import is_done, stage_seconds
from frugalpath.recipe.data import RunData
from frugalpath.recipe.features import cases_of

if TYPE_CHECKING:
    from frugalpath.evaluation.run import EvaluationResult

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy", "openslide-python")
LOGGED = (
    "step",
    "reward",
    "reward_std",
    "entropy",
    "frac_reward_zero_std",
    "completions/mean_length",
    "learning_rate",
)
"""Columns of the joint stage's log kept in the summary, besides those of single rewards and the allocator."""


def write_report(
    data: RunData, performer: Performer, outcome: EvaluationResult, summary: dict[str, Any]
) -> dict[str, Any]:
    """Write `report/` of the run's folder and return the whole summary.

    Args:
        performer: the trained performer.
        summary: results on the test cases.
    """
    joint = is_done(data.run.folder / "grpo", grpo_key(data)) or {}
    summary = {
        **summary,
        "training": curves(joint.get("log", [])),
        "warnings": [*joint.get("warnings", []), *summary["warnings"]],
        "missing_slides": missing_slides(data.cases, data.bank.missing),
        "splits": {s: len(members) for s, members in data.splits.items()},
        "patients": {s: len({c.patient for c in members}) for s, members in data.splits.items()},
        "asked": question_examples(data.cases),
        "seconds": stage_seconds(data.run.folder),
        "reproduce": reproduce(summary, sys.argv[1:]),
        **provenance(data),
    }
    write_outcome(data.run.folder / "report", outcome, summary, Pictures(performer, outcome.cases))
    return summary


def write_outcome(
    folder: Path, outcome: EvaluationResult, summary: dict[str, Any], pictures: Pictured | None = None
) -> None:
    """Write summary, cases, picture and page on the main process.

    Args:
        pictures: see `write_page`.
    """
    if PartialState().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_text(folder / "cases.jsonl", _cases(outcome))
        plot(summary, folder / "pareto.png")
        write_page(folder, pictures)


def provenance(data: RunData) -> dict[str, Any]:
    """What the results depend on besides the cases: units, rewards of the score, ladder, seed, versions, revision."""
    return {
        "price_unit": "score per cost of the largest budget",
        "scored_by": {r.name: r.score_weight for r in data.scorer.rewards},
        "ladder": data.run.ladder,
        "seed": data.run.grpo.seed,
        "versions": _versions(),
        "git": revision(),
        "command": command(),
    }


def curves(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Rows of a training log with a reward, reduced to the columns of the learning curves."""
    kept = [row for row in log if "reward" in row]
    mean = [k for k in (kept[0] if kept else ()) if k.startswith("rewards/") and k.endswith("/mean")]
    online = [k for k in (kept[0] if kept else ()) if k.startswith("allocator/")]
    return [{k: row[k] for k in (*LOGGED, *mean, *online) if k in row} for row in kept]


def reproduce(summary: Mapping[str, Any], arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Commands that answer the test cases at each point: `{price | budget, command}`.

    Args:
        arguments: of the current command, with the recipe and its changes.
    """
    out = []
    for p in (*summary["static"], *summary["allocator"], summary["operating_point"]):
        (key,) = {"price", "budget"} & p.keys()
        setting = ["--split", "test", f"--{key}", f"{p[key]:g}"]
        out.append({key: p[key], "command": shlex.join(["frugalpath", "answer", *arguments, *setting])})
    return out


def missing_slides(cases: Sequence[Case], missing: Mapping[str, str]) -> list[dict[str, Any]]:
    """Slides without features: `slide`, `reason`, and the number of `cases` that were used without it."""
    count = cases_of(cases, missing)
    return [{"slide": slide, "reason": reason, "cases": count[slide]} for slide, reason in missing.items()]


def _cases(outcome: EvaluationResult) -> str:
    table, decisions = outcome.whole, outcome.decisions
    lines = []
    for i, case in enumerate(outcome.cases):
        k = table.budgets.index(outcome.ladder[decisions.rungs[i]])
        row = {
            "id": case.id,
            "patient": case.patient,
            "task": case.task,
            "question": case.question,
            "prompt": case.prompt,
            "answer": case.answer,
            "budget": table.budgets[k],
            "completion": table.text[i][k],
            "score": float(decisions.score[i]),
            "tokens": int(decisions.visual[i]),
            "prompt_tokens": int(table.prompt[i, k]),
            "generated_tokens": int(table.generated[i, k]),
            "flops": float(decisions.cost[i]),
            "score_by_budget": {str(b): float(table.score[i, j]) for j, b in enumerate(table.budgets)},
        }
        if outcome.predicted is not None:
            values = zip(outcome.ladder, outcome.predicted[i], strict=True)
            row["predicted"] = {str(b): round(float(v), 4) for b, v in values}
        if decisions.details is not None:
            row |= {"rung": table.budgets[k], **decisions.details[i]}
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def revision(root: Path = Path(__file__).parents[2]) -> str | None:
    """Git revision of the sources, marked if they have changes; None unless they are a git checkout.

    Args:
        root: folder of the sources. If it lies inside another repository, that revision is ignored.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def command() -> str:
    """Reconstruct the command from its arguments and the launcher's variables, without the launcher's options."""
    processes, launched = PartialState().num_processes, os.environ
    if launched.keys() & {"ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_CONFIG_DS_FIELDS"}:
        words = ["accelerate", "launch", "--num_processes", str(processes)]
    elif "TORCHELASTIC_RUN_ID" in launched:
        nodes, each = (launched.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        words = ["torchrun", "--nnodes", nodes, "--nproc_per_node", each]
    else:
        words = []
    # The command `frugalpath` names itself and its first argument.
    program = [sys.argv[0]] if words or not sys.argv[0].startswith("frugalpath ") else sys.argv[0].split()
    if not words and len(program) == 1:
        program = ["python", *program]
    told = shlex.join([*words, *program, *sys.argv[1:]])
    return told if words or processes == 1 else f"{told}  # {processes} processes"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}
    try:
        return found | {"frugalpath": version("frugalpath")}
    except PackageNotFoundError:  # used from its folder
        return found
