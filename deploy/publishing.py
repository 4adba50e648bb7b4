"""Export a trained run to one self-contained folder: performer, allocator, tokenizer, recipe, evaluation, card.

The folder includes nothing of the run's cases: no ids, texts, images, features or local paths.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from frugalpath.errors import InputError
from frugalpath.evaluation.report.card import About, data_name, write_card
from frugalpath.evaluation.report.examples import example_arguments
from frugalpath.models.adapters import ADAPTER, join_adapters, keep_added
from frugalpath.models.gemma_vl import load_gemma
from frugalpath.models.qwen_vl import load_qwen
from frugalpath.models.slide_vlm import SlideVLM
from frugalpath.recipe.finished import EVALUATION, MARK, SUMMARY, check_finished, settings
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.recipe.run import AllocatorOptions, EncoderConfig, EvaluationOptions, Run, parse_recipe
from frugalpath.sft.supervised import LANGUAGE_WEIGHTS

PERFORMER = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
ALLOCATOR = ("config.json", "model.safetensors", "decider.json", "escalation.npz")
"""Files of a run's folders that are published; all others are left out."""
KNOWN = (
    "n", "n_patients", "n_without_patient", "splits", "patients", "static", "allocator", "random", "oracle",
    "text_only", "majority", "operating_point", "operating_random", "operating", "headline", "frontier",
    "calibration", "information", "latency", "by_question", "chosen", "attribution", "synoptic", "linear_probe",
    "warnings", "price_unit", "ladder", "seed", "versions", "git", "seconds", "asked",
)  # fmt: skip
"""Keys of the report that are published: figures over all cases. Others name files, commands or cases."""
PLACES = ("path", "folder", "root", "checkpoint", "output_dir", "logging_dir", "run_name", "vision_cache")
"""Keys of a recipe that hold local paths."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference from the evaluated weights, as a share of a matrix's largest weight."""
READERS: dict[str, Callable[[Path], Any]] = {
    "slide_vlm": SlideVLM.from_pretrained,
    "qwen_vl": load_qwen,
    "gemma_vl": load_gemma,
}
"""Loaders of published models, by the performer's family."""
USE = """    frugalpath answer --model FOLDER {example}

`FOLDER` is this folder. The model alone: `load_performer(FOLDER, ...)`, or `from_pretrained(FOLDER)`{extra}."""


def publish(
    run: Run, given: Sequence[str], to: Path, about: About, merge: bool = False, base: str | None = None
) -> None:
    """Write the published folder atomically.

    Args:
        given: recipe arguments from the command line.
        merge: merge adapters and write the full weights.
        base: Hub name of the adapters' base model.

    Raises:
        InputError: the run is not finished, `to` exists, or the adapters cannot be published alone.
    """
    check_finished(run)
    if to.exists():
        raise InputError(f"{to}: exists; name a new folder, or delete it")
    report = run.folder / SUMMARY
    if not report.is_file():
        raise InputError(f"{report}: no report to publish; run: frugalpath pareto --config {run.path}")
    summary = {k: v for k, v in json.loads(report.read_text()).items() if k in KNOWN}
    part = to.with_name(f"{to.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        name = base or run.performer.pretrained or run.performer.language_model
        adapters = [] if merge else adapters_of(run)
        if adapters and (name is None or (base is None and Path(name).exists())):
            raise InputError(
                f"performer: adapters lie over {name or 'a model that this run made'}, which only this machine has; "
                "name one of the Hub by --base, or publish with --merge"
            )
        _write_performer(run, part, adapters, name)
        _copy(run.folder / "allocator", part / "allocator", ALLOCATOR)
        if run.allocator.form == "text":
            _copy(run.folder / "text", part / "text", ("adapter_config.json", "adapter_model.safetensors"))
        _write_json(part / EVALUATION, summary)
        (part / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(run, given), sort_keys=False, allow_unicode=True))
        own = parse_recipe(["--config", str(part / "recipe.yaml"), "--output_dir", str(part)])
        for path in part.rglob("*config.json"):
            _forget_places(path, keep=name if adapters else None)
        known = None if name is None or Path(name).exists() else name
        about = dataclasses.replace(
            about, title=about.title or f"FrugalPath {to.name}", data=about.data or data_name(run)
        )
        extra = "; only adapters are stored, the base is downloaded by name" if adapters else ""
        write_card(
            part / "README.md", own, summary, about, known, USE.format(extra=extra, example=example_arguments(summary))
        )
        mark = {"format": 1, "weights": "adapter" if adapters else "whole", "parts": settings(own)}
        files = sorted(str(p.relative_to(part)) for p in part.rglob("*") if p.is_file())
        _write_json(part / MARK, {**mark, "files": [*files, MARK]})
        os.replace(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def adapters_of(run: Run) -> list[Path]:
    """Adapters of the run's stages in training order; empty if all weights were trained."""
    if run.performer.lora is None or run.performer.checkpoint:
        return []
    last = "grpo_performer" if run.grpo.mode == "sequential" else "grpo"
    found = []
    for name in (*(stage.name for stage in run.sft), last):
        folder = run.folder / name / ADAPTER
        if (folder / LANGUAGE_WEIGHTS).is_file():
            raise InputError(
                f"{folder}: its stage trained more of the language model than adapters; publish with --merge"
            )
        if folder.is_dir():
            found.append(folder)
    return found


def uploads(folder: Path) -> list[str]:
    """List the files of a published folder to upload.

    Raises:
        InputError: the folder was not published, or lacks some of its files.
    """
    mark = folder / MARK
    if not mark.is_file():
        raise InputError(f"{folder}: was not written by `frugalpath publish`; give --config to write it")
    files = json.loads(mark.read_text())["files"]
    if lost := [name for name in files if not (folder / name).is_file()]:
        raise InputError(f"{folder}: {', '.join(lost)} is missing; publish it again")
    return files


def recipe_of(run: Run, given: Sequence[str]) -> dict[str, Any]:
    """The recipe as it was run, including command-line changes and without local paths."""
    content = yaml.safe_load(run.path.read_text()) if run.path else {}
    asked = {*content, *(word[2:].partition("=")[0] for word in given if word.startswith("--"))}
    grpo = {f.name for f in dataclasses.fields(FrugalConfig)} & asked
    values = run.grpo.to_dict()
    sections = {
        "cases": run.cases,
        "encoder": _changed(run.encoder, EncoderConfig()),
        "performer": _changed(run.performer, type(run.performer)()),
        "ladder": run.ladder,
        "sft": [{"stage": stage.kind, **stage.options} for stage in run.sft],
        "questions": run.questions,
        "balance": run.balance,
        "rewards": [_by_name(reward) for reward in run.rewards],
        "allocator": _changed(run.allocator, AllocatorOptions()),
        "evaluation": _changed(run.evaluation, EvaluationOptions()),
        **{key: values[key] for key in sorted(grpo) if not key.startswith(("hub_", "push_to_"))},
    }
    return _portable(sections)


def _write_performer(run: Run, out: Path, adapters: Sequence[Path], base: str | None) -> None:
    folder = run.folder / "grpo"
    if not adapters:
        _copy(folder, out, PERFORMER)
        return
    assert base is not None
    slide, read = run.performer.family == "slide_vlm", READERS[run.performer.family]
    # Beside a configuration, stock loaders would take the folder for a whole model.
    own = [name for name in PERFORMER if "safetensors" not in name and (slide or name != "config.json")]
    _copy(folder, out, own)
    place = out / ADAPTER if slide else out
    join_adapters(adapters, base, place)
    evaluated = read(folder)
    if slide:
        keep_added(evaluated, base, place)
    _check_same(evaluated, read(out))


def _check_same(evaluated: torch.nn.Module, published: torch.nn.Module) -> None:
    """Raise InputError if the adapters over their base do not reproduce the evaluated weights."""
    told = published.state_dict()
    for name, weight in evaluated.state_dict().items():
        off = (told[name].float() - weight.float()).abs().max() if weight.numel() else torch.zeros(())
        if off > TOLERANCE.get(weight.dtype, 0.0) * max(1.0, float(weight.float().abs().max())):
            raise InputError(
                f"{name}: the adapters over their base are {float(off):.2g} off the weights that were evaluated: "
                "something else was trained too; publish with --merge"
            )


def _copy(folder: Path, out: Path, patterns: Iterable[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}):
        shutil.copyfile(path, out / path.name)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _forget_places(path: Path, keep: str | None) -> None:
    """Remove local model paths from a configuration, except the base of adapters."""
    content = json.loads(path.read_text())
    for key in ("_name_or_path", "base_model_name_or_path"):
        if content.get(key) not in (None, keep):
            content[key] = None
    _write_json(path, content)


def _changed(options: Any, default: Any) -> dict[str, Any]:
    """Keys of a section that differ from their defaults."""
    before = dataclasses.asdict(default)
    return {key: value for key, value in dataclasses.asdict(options).items() if value != before[key]}


def _portable(value: Any) -> Any:
    """A recipe value without local paths."""
    if isinstance(value, Mapping):
        return {k: _portable(v) for k, v in value.items() if k not in PLACES and not _is_place(v)}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value if not _is_place(v)]
    return value


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and (Path(value).is_absolute() or ("/" in value and Path(value).exists()))


def _by_name(reward: Any) -> Any:
    """An entry of `rewards`, with a user's file reduced to its name."""
    if isinstance(reward, dict):
        return {**reward, "name": Path(reward["name"]).name}
    return Path(reward).name
