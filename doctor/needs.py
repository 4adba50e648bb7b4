"""Check what a recipe needs and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from frugalpath.doctor.machine import Check, hub, installed
from frugalpath.envs.convert import cell
from frugalpath.envs.new_cases import COLUMNS
from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError
from frugalpath.models.language_model import GGUF, PACKAGE, gguf_file
from frugalpath.recipe.run import Run
from frugalpath.slides.encoder import DEFAULT
from frugalpath.slides.jobs import SUFFIXES

MAKERS = ("simulator", "mosaic")
"""Environments that create their case folder themselves."""


def needs(run: Run) -> list[Check]:
    """List what a recipe needs, one check each."""
    return [*_files(run), *_models(run), *_packages(run)]


def _files(run: Run) -> Iterator[Check]:
    for key, value in run.cases.items():
        if key in ("path", "root", "tiles") or (key == "folder" and run.cases["name"] not in MAKERS):
            for name in value if isinstance(value, list) else [value]:
                yield _file(f"cases.{key}", name, run, "correct the path, or put your data there (docs/data.md)")
    for reward in run.rewards:
        name = reward.get("name", "") if isinstance(reward, dict) else str(reward)
        path = name.partition(":")[0]
        if path.endswith(".py"):
            yield _file("rewards", path, run, "correct the path of the reward's file")
    if run.encoder.folder:
        there = Path(run.encoder.folder).is_dir()
        found = "features are there" if there else "made by the run"
        yield Check("encoder.folder", None, f"{run.encoder.folder}: {found}")


def _file(what: str, name: Any, run: Run, remedy: str) -> Check:
    places = [Path(str(name)), run.base / str(name)]
    there = next((p for p in places if p.exists()), None)
    return Check(what, there is not None, f"{name}{'' if there else ' does not exist'}", remedy)


def _models(run: Run) -> Iterator[Check]:
    performer = run.performer
    if performer.checkpoint:
        there = (Path(performer.checkpoint) / "config.json").is_file()
        yield Check("performer.checkpoint", there, performer.checkpoint, "name a folder that a run has written")
    for key in ("language_model", "pretrained"):
        name = getattr(performer, key)
        belongs = key == ("language_model" if performer.family == "slide_vlm" else "pretrained")
        if name and belongs and not performer.checkpoint:
            yield checkpoint(f"performer.{key}", name)
    if run.encoder.name != DEFAULT and not run.encoder.name.startswith("timm:"):
        yield checkpoint("encoder.name", run.encoder.name)


def checkpoint(what: str, name: str) -> Check:
    """Check whether a model is a local folder, in the Hub's cache, or must be downloaded."""
    if Path(name).is_dir():
        there = (Path(name) / "config.json").is_file()
        return Check(what, there, f"{name}: a local folder", "it holds no config.json; name a saved model's folder")
    if name.startswith(PACKAGE) or name.endswith(GGUF):
        try:
            gguf_file(name)
        except InputError as error:
            _, _, found = str(error).partition(f"{name}: ")
            found, _, remedy = found.partition("; ")
            return Check(what, False, f"{name}: {found}", remedy)
        return Check(what, True, f"{name}: a local file")
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return Check(what, False, f"{name} is neither a folder nor a name of the hub", "correct the path")
    if cached:
        return Check(what, True, f"{name}: in the hub's cache")
    reach = hub()
    remedy = f"hf download {name} where there is a network, then name that folder; some models ask for hf auth login"
    return Check(
        what, bool(reach.ok), f"{name}: on the hub, {'to be downloaded' if reach.ok else reach.found}", remedy
    )


def _packages(run: Run) -> Iterator[Check]:
    wanted = {
        "gguf": (_reads_gguf(run), "pip install gguf (the extra frugalpath[gguf])"),
        "timm": (run.encoder.name.startswith("timm:"), "pip install 'frugalpath[timm]'"),
        "vllm": (run.grpo.use_vllm, "install TRL's supported vllm, or set use_vllm to false"),
        "deepspeed": (bool(run.grpo.deepspeed), "pip install 'frugalpath[gpu]', or leave deepspeed out"),
        **{name: (name in _reporters(run), f"pip install {name}, or set report_to: none") for name in
           ("wandb", "trackio", "tensorboard")},
    }  # fmt: skip
    for package, (needed, remedy) in wanted.items():
        if needed:
            found = installed(package)
            yield Check(package, found is not None, found or "not installed", remedy)
    if run.performer.family == "slide_vlm" and _slides(run):
        found = installed("openslide-python", "openslide")
        remedy = "pip install openslide-python openslide-bin, or give feature files (.h5)"
        yield Check("OpenSlide for its slides", found is not None, found or "not installed", remedy)


def _reads_gguf(run: Run) -> bool:
    performer = run.performer
    built = performer.family == "slide_vlm" and not performer.checkpoint
    return built and str(performer.language_model).endswith(GGUF)


def _reporters(run: Run) -> list[str]:
    named = run.grpo.report_to
    return [named] if isinstance(named, str) else list(named or [])


def _slides(run: Run) -> bool:
    """Whether the cases include slides to read."""
    if run.cases["name"] in MAKERS:
        return True
    rows = _manifest(run)
    return any(str(v).lower().endswith(tuple(SUFFIXES)) for row in rows[:100] for v in _values(row))


def _values(row: dict[str, Any]) -> Iterator[Any]:
    for value in row.values():
        yield from value if isinstance(value, list) else [value]


def images(run: Run) -> int | None:
    """Maximum number of images and slides of the cases; None if the recipe does not tell."""
    if run.cases["name"] == "simulator" and isinstance(run.cases.get("slides"), int):
        return run.cases["slides"]
    named = run.cases.get("slide_column") or run.cases.get("image_column") or COLUMNS["image_column"]
    keys = {"images", "slides", str(named)}
    # A row may show several, and several rows the same one.
    return len({_path(entry) for row in _manifest(run) for key in keys for entry in _entries(row, key)}) or None


def _entries(row: dict[str, Any], key: str) -> list[Any]:
    """Entries of a cell; empty if it is empty or unreadable."""
    try:
        value = cell(key, row.get(key))
    except InputError:
        return []
    return value if isinstance(value, list) else [] if value is None else [value]


def _path(entry: Any) -> str:
    """Path of an entry, which is a mapping in some ms-swift files."""
    return str(entry.get("path") if isinstance(entry, dict) else entry)


def _manifest(run: Run) -> list[dict[str, Any]]:
    """Raw rows of the manifest, without unreadable ones; empty if there is no such file.

    Raises:
        InputError: the file cannot be read at all.
    """
    path = run.cases.get("path")
    if run.cases["name"] != "manifest" or not isinstance(path, str) or not Path(path).is_file():
        return []
    return [row.values for row in read_rows(Path(path))[0]]
