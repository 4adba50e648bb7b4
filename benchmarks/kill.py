"""What SIGKILL costs a run: it is killed at random moments of every phase, and each resumed run must end the same.

    python benchmarks/kill.py --out FOLDER
    python benchmarks/kill.py --out FOLDER --config RECIPE --phases rollout "checkpoint write" --seed 3

The recipe (by default `kill.yaml` beside this file, half a minute on a core) is run once undisturbed, and then for
each phase again, in a folder of its own under `--out`: its whole process group is killed at a moment drawn uniformly
from the time that the undisturbed run spent in the phase, and the same command is given again. Features are kept in
the run's folder, so that they are extracted anew each time. Phases:

- `extraction`, `sft`, `sft checkpoint`, `rollout`, `update`, `checkpoint write`;
- `stage end` (weights and the mark of a finished stage), `evaluation` (score tables), `fit` (of the allocator);
- `report`.

Checked of each:

- after the kill every file is readable but for those of unfinished work: a checkpoint or a stage without its mark;
- after the resume every file is readable, and no temporary file is left in the run's folder;
- what was finished when the run was killed (features, stages, tables) is not written again;
- no more steps are trained than from the last whole checkpoint on;
- summary.json is that of the undisturbed run but for times, paths and commands.

One JSON line; exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h5py
import numpy as np
import torch
import transformers
import trl
import yaml
from safetensors import safe_open

from benchmarks.measure import machine, versions
from frugalpath.errors import InputError, entry
from frugalpath.recipe.checkpoints import DONE, WHOLE, last_whole
from frugalpath.slides.images import read_image

ROOT = Path(__file__).resolve().parents[1]
PLAN = "FRUGALPATH_KILL"
"""Environment variable of a watched run: JSON of `trace` and, where it is to be killed, `phase`, `call`, `delay`."""

PHASES = {
    "extraction": "frugalpath.recipe.features:_extract",
    "sft": "frugalpath.sft.supervised:StageTrainer.training_step",
    "sft checkpoint": "frugalpath.sft.supervised:StageTrainer._save_checkpoint",
    "rollout": "frugalpath.rl.joint:FrugalTrainer._generate_and_score_completions",
    "update": "frugalpath.rl.joint:FrugalTrainer.training_step",
    "checkpoint write": "frugalpath.rl.joint:FrugalTrainer._save_checkpoint",
    "stage end": "frugalpath.recipe.checkpoints:mark_done",
    "evaluation": "frugalpath.allocator.score_table:score_table",
    "fit": "frugalpath.rl.grpo:fit_allocator",
    "report": "frugalpath.rl.pareto:write_report",
}
"""Phase -> the function whose calls it is made of."""

TRAINED = {"sft": ("sft", "sft_continued"), "update": ("grpo",)}
"""Phase with a call for each micro-step -> folders of the stages that it trains."""
PASSING = ("versions", "git", "command", "reproduce", "latency", "seconds", "latency_ms", "config")
"""Keys of a summary that say when and where it was made."""


def watched(script: str) -> None:
    """Run a script in this process, note the time of each call of a phase, and kill the process group as planned."""
    plan = json.loads(os.environ[PLAN])
    spans: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for phase, place in PHASES.items():
        module, _, path = place.partition(":")
        owner: Any = __import__(module, fromlist=["_"])
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, _timed(getattr(owner, name), phase, spans, plan))
    sys.argv = [script, *sys.argv[2:]]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        Path(plan["trace"]).write_text(json.dumps(spans))


def _timed(function: Any, phase: str, spans: dict[str, list[float]], plan: dict[str, Any]) -> Any:
    def kill() -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def call(*args: Any, **kwargs: Any) -> Any:
        planned = plan.get("phase") == phase and plan["call"] == len(spans[phase])
        if planned:
            threading.Timer(plan["delay"], kill).start()
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if planned:  # faster than in the undisturbed run
                kill()
            spans[phase].append(time.perf_counter() - start)

    return call


def run(recipe: Path, folder: Path, trace: Path, **kill: Any) -> subprocess.CompletedProcess:
    """The recipe's run in a process group of its own."""
    script = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--watched", str(ROOT / "rl/grpo.py")]
    own = ["--config", str(recipe), "--output_dir", str(folder), "--set", f"encoder.folder={folder / 'features'}"]
    if recipe == Path(__file__).resolve().with_suffix(".yaml"):
        own.append(f"cases.folder={folder.parent / 'slides'}")
    env = {**os.environ, PLAN: json.dumps({"trace": str(trace), **kill})}
    return subprocess.run(
        [*script, *own], cwd=ROOT, env=env, capture_output=True, text=True, start_new_session=True, check=False
    )


def files(folder: Path) -> Iterator[Path]:
    """All files under a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def unreadable(path: Path) -> str | None:
    """Why a file cannot be read, None if it can or is of a kind that says nothing of being whole."""
    try:
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".jsonl":
                text = path.read_text()
                [json.loads(line) for line in text.splitlines()]
                assert not text or text.endswith("\n"), "its last line is cut off"
            case ".yaml":
                assert yaml.safe_load(path.read_text()) is not None, "it is empty"
            case ".npz" | ".npy":
                found = np.load(path, allow_pickle=False)
                [found[key] for key in found] if path.suffix == ".npz" else None
            case ".safetensors":
                with safe_open(path, "pt") as kept:
                    [kept.get_tensor(key) for key in kept.keys()]  # noqa: SIM118
            case ".h5":
                with h5py.File(path) as kept:
                    [kept[key][:] for key in kept]
            case ".png":
                read_image(path)
            case ".html":
                assert path.read_text().rstrip().endswith("</html>"), "its end is missing"
    except Exception as error:
        return f"{path}: {type(error).__name__}: {error}"
    return None


def unfinished(path: Path, folder: Path) -> bool:
    """Whether a file belongs to work that nothing takes for whole: a checkpoint or a stage without its mark."""
    own = path.relative_to(folder).parts
    if len(own) < 2:
        return False
    if len(own) > 2 and own[1].startswith("checkpoint-"):
        return not (folder / own[0] / own[1] / WHOLE).is_file()
    stage = own[0] in ("sft", "sft_continued", "grpo", "grpo_performer", "allocator", "text")
    return stage and not (folder / own[0] / DONE).is_file()


def temporary(path: Path) -> bool:
    """Whether a file's name is that of one that is being written."""
    return path.suffix in (".part", ".tmp", ".lock") or ".part" in path.suffixes


def kept(folder: Path) -> dict[str, int]:
    """Files of finished work and when they were written, in ns."""
    found = {}
    for path in files(folder):
        own = path.relative_to(folder).parts
        lasting = path.name == DONE or own[0] == "tables" or path.suffix == ".h5" or path.name == "model.safetensors"
        # Checkpoints are dropped as later ones come.
        if lasting and not temporary(path) and not unfinished(path, folder) and "checkpoint-" not in str(path.parent):
            found["/".join(own)] = path.stat().st_mtime_ns
    return found


def results(folder: Path) -> Any:
    """The summary without what passes."""
    text = (folder / "report" / "summary.json").read_text().replace(str(folder), "RUN")
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k not in PASSING})


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Places at which two results differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [p for k in sorted({*a, *b}) for p in differing(a.get(k), b.get(k), f"{where}.{k}".strip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differing(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {str(a)[:40]} and {str(b)[:40]}"]


def steps_left(folder: Path, reference: Path, whole: dict[str, list[float]]) -> dict[str, float]:
    """Phase -> calls that a run may still make, from its last whole checkpoints on."""
    left = {}
    for phase, stages in TRAINED.items():
        done = {name: reference / name / DONE for name in stages}
        steps = {name: json.loads(path.read_text())["steps"] for name, path in done.items() if path.is_file()}
        still = 0
        for name, total in steps.items():
            if not (folder / name / DONE).is_file():
                last = last_whole(folder / name)
                still += total - int(Path(last).name.rpartition("-")[2]) if last else total
        left[phase] = len(whole[phase]) * still / sum(steps.values())
    return left


def trial(recipe: Path, folder: Path, phase: str, whole: dict[str, list[float]], reference: Path, rng: Any) -> dict:
    """Kill a run in a phase, resume it and check both."""
    spans = whole[phase]
    call = rng.choices(range(len(spans)), weights=spans)[0]
    # A step begins with its rollouts.
    begins = sum(whole["rollout"]) / sum(spans) if phase == "update" else 0.0
    delay = spans[call] * rng.uniform(begins, 1)
    first = run(recipe, folder, folder.with_suffix(".killed.json"), phase=phase, call=call, delay=delay)
    told = {"phase": phase, "call": call, "delay_s": round(delay, 3), "killed": first.returncode == -signal.SIGKILL}
    if not told["killed"]:
        return {**told, "problems": [f"ended with {first.returncode} before it was killed: {first.stderr[-500:]}"]}
    problems = [
        why
        for path in files(folder)
        if not temporary(path) and not unfinished(path, folder) and (why := unreadable(path))
    ]
    before, left = kept(folder), steps_left(folder, reference, whole)
    trace = folder.with_suffix(".resumed.json")
    second = run(recipe, folder, trace)
    if second.returncode:
        return {**told, "problems": [*problems, f"does not resume: {second.stderr[-800:]}"]}
    problems += [why for path in files(folder) if (why := unreadable(path))]
    problems += [f"{path}: was left behind" for path in files(folder) if temporary(path)]
    problems += [
        f"{path}: part of a checkpoint without its mark" for path in files(folder) if unfinished(path, folder)
    ]
    after = kept(folder)
    problems += [f"{name}: was written again" for name, written in before.items() if after.get(name) != written]
    again = json.loads(trace.read_text())
    for name, most in left.items():
        if len(again[name]) > most + 1e-6:
            problems.append(f"{name}: {len(again[name])} calls after the kill, {most:.0f} are left by the checkpoint")
    problems += [f"summary: {place}" for place in differing(results(folder), results(reference))[:10]]
    spared = {name: len(whole[name]) - len(again[name]) for name in whole}
    return {**told, "finished_before": len(before), "calls_spared": spared, "problems": problems}


def measure(recipe: Path, out: Path, phases: list[str], seed: int) -> dict[str, Any]:
    """The undisturbed run, then a trial for each phase."""
    rng = random.Random(seed)
    reference, trace = out / "whole", out / "whole.json"
    start = time.perf_counter()
    done = run(recipe, reference, trace)
    if done.returncode:
        raise InputError(f"{recipe}: the undisturbed run fails: {done.stderr[-2000:]}")
    seconds, whole = time.perf_counter() - start, json.loads(trace.read_text())
    idle = [phase for phase in phases if not whole[phase]]
    if idle:
        raise InputError(f"{recipe}: its run has no phase {', '.join(idle)}; leave it out with --phases")
    rows = []
    for number, phase in enumerate(phases):
        row = trial(recipe, out / f"killed{number}", phase, whole, reference, rng)
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return {"seed": seed, "seconds_whole": round(seconds, 1), "trials": rows}


@entry
def main() -> None:
    """Print what was found."""
    if sys.argv[1:2] == ["--watched"]:
        sys.argv.pop(1)
        watched(sys.argv[1])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"), metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, for the runs")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if args.out.exists():
        raise InputError(f"{args.out}: exists; name a new folder")
    args.out.mkdir(parents=True)
    found = measure(args.config.resolve(), args.out.resolve(), args.phases, args.seed)
    ok = not any(row["problems"] for row in found["trials"])
    print(
        json.dumps(
            {
                "benchmark": "kill",
                "ok": ok,
                **found,
                "machine": machine("cpu"),
                "versions": versions(torch, transformers, trl),
            }
        )
    )
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
