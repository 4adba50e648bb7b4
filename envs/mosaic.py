"""The `mosaic` environment: fields and slides put together from real labelled tiles, with true boxes and area.

In a mosaic one, several or no regions are lesion, or nearly all of it is. Which tissue makes up the field shows in one
pooled token; where a lesion lies takes a few, how many there are and their outlines take many. Tiles keep their split,
so train and test mosaics share none.

Keys of `cases`:

    tiles: folder with one sub-folder per class, or a manifest with a file and a label in each row.
    folder: where mosaics are written. A folder written with the same parameters is used again, or completed.
    background: label or labels of the tissue around lesions; each mosaic has one.
    lesion: label or labels of the lesion; each mosaic has one.
    mosaics: how many of each split, such as `{train: 800, val: 100, test: 300}`.
    kind: `field` (JPEG images) or `slide` (tiled pyramidal TIFF with mpp, glass around the tissue).
    grid: tiles along a side.
    tile_px: pixels of a tile; tiles of another size are resized.
    region_tiles: smallest and largest side of a lesion region in tiles; at most half the grid.
    questions: which of `diagnosis`, `presence`, `count`, `quadrant`, `boxes` to ask, of several mosaics which of
        `case_presence`, `which_slide`, `lesion_slides`; all by default.
    slides_per_case: above 1, there are cases of so many mosaics, fields or slides, and the default is to ask about
        these alone; as many whole cases are made as `mosaics` allows. One third of them has no lesion, one third
        on one mosaic alone. Kinds about one mosaic that are named in `questions` are asked of single ones.
    lesion_name: what questions call the lesion; its label, or `lesion` where there are several.
    image_column, label_column, patient_column: columns of the tile manifest.
    val_fraction: share of the train tiles set apart for val mosaics, where the tiles have no val split.
    test_fraction: share of the train tiles set apart for test mosaics, where they have no test split.
    mpp: micrometres per pixel of a tile as it is stored; the column `mpp` by default. Slides need one.
    margin: tiles of glass around the mosaic; 0 for fields, 1 for slides by default.
    quality: of the JPEG compression.
    seed: of all that is drawn.
    workers: threads that write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from frugalpath.envs.case import SPLITS, Case
from frugalpath.envs.files import FileFacts, inspect_files
from frugalpath.envs.manifest import read_manifest
from frugalpath.envs.mosaic_cases import (
    CASE_QUESTIONS,
    QUESTIONS,
    answer_of,
    ask,
    ask_cases,
    options_of,
    prompt_of,
    several_cases,
)
from frugalpath.envs.mosaic_files import ASKED, Mosaic, plan_mosaics, write_lines, write_mosaics
from frugalpath.envs.mosaic_layout import can_hold
from frugalpath.errors import InputError

VERSION = 1  # of the rules by which mosaics are made; another number makes older folders unusable
_RECORD, _CASES, _TRUTH = "mosaic.json", "cases.jsonl", "truth.jsonl"


def build(
    *,
    tiles: str,
    folder: str,
    background: str | Sequence[str],
    lesion: str | Sequence[str],
    mosaics: Mapping[str, int],
    kind: Literal["field", "slide"] = "field",
    grid: int = 8,
    tile_px: int = 96,
    region_tiles: Sequence[int] = (3, 4),
    questions: Sequence[str] | None = None,
    slides_per_case: int = 1,
    lesion_name: str | None = None,
    image_column: str = "file",
    label_column: str = "label",
    patient_column: str | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.0,
    mpp: float | None = None,
    margin: int | None = None,
    quality: int = 90,
    seed: int = 0,
    workers: int = 2,
) -> list[Case]:
    """Write the mosaics that are not there yet and return the questions about them, or about cases of several.

    Args: the keys of `cases`, which the module describes.

    Returns:
        cases of all splits; `extra` holds `mosaic` (none, focal-1 .. focal-3, diffuse; joined by commas for several),
        `regions`, `area` (share of the mosaics that is lesion) and `mpp` where it is known.

    Raises:
        InputError: a parameter is out of range, a class has no tiles in a split, or the folder holds other mosaics.
    """
    backgrounds, lesions = _labels(background), _labels(lesion)
    asked_for = list(questions if questions is not None else QUESTIONS if slides_per_case == 1 else CASE_QUESTIONS)
    margin = (1 if kind == "slide" else 0) if margin is None else margin
    counted = dict(grid=grid, tile_px=tile_px, workers=workers, slides_per_case=slides_per_case)
    labels = [*backgrounds, *lesions]
    _check(kind, mosaics, asked_for, labels, counted, dict(margin=margin, seed=seed), region_tiles, quality)
    counts = {split: mosaics[split] // slides_per_case * slides_per_case for split in SPLITS if mosaics.get(split)}
    source = read_manifest(
        tiles,
        prompt="tile",
        image_column=image_column,
        answer_column=label_column,
        patient_column=patient_column,
        val_fraction=val_fraction if "val" in counts else 0.0,
        test_fraction=test_fraction if "test" in counts else 0.0,
        seed=seed,
        duplicates="drop",
    )
    facts, _ = inspect_files(image for case in source for image in case.images)
    pools = _pools(source, facts, [*backgrounds, *lesions], counts, tiles)
    mpp = _resolution(source, facts, mpp, tile_px)
    if kind == "slide" and mpp is None:
        raise InputError(f"{tiles}: a slide has one resolution; set mpp, or give all tiles one in a column mpp")
    digests = {"/".join(key): [facts[path].digest for path in paths] for key, paths in pools.items()}
    record = {
        "version": VERSION,
        "tiles": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        "background": backgrounds,
        "lesion": lesions,
        "mosaics": counts,
        "kind": kind,
        "grid": grid,
        "tile_px": tile_px,
        "region_tiles": list(region_tiles),
        "mpp": mpp,
        "margin": margin,
        "quality": quality,
        "seed": seed,
    }
    if slides_per_case > 1:
        record["slides_per_case"] = slides_per_case
    names = _Names(lesion_name or (lesions[0] if len(lesions) == 1 else "lesion"), (*backgrounds, *lesions))
    return _ask(record, pools, asked_for, names, Path(folder), Path(tiles), slides_per_case, workers)


@dataclass(frozen=True)
class _Names:
    lesion: str
    tissues: tuple[str, ...]


def _ask(
    record: Mapping[str, Any],
    pools: Mapping[tuple[str, str], list[str]],
    questions: Sequence[str],
    names: _Names,
    folder: Path,
    tiles: Path,
    slides_per_case: int,
    workers: int,
) -> list[Case]:
    """Write the mosaics of a record that are not there yet; the questions about them.

    Args:
        record: what a mosaic depends on. pools: tiles by split and label. tiles: where they come from.
    """
    home = folder.expanduser().absolute()
    plan = plan_mosaics(record, pools)
    asked = _choose(plan, record, [q for q in questions if q in QUESTIONS], 1)
    asked_of_cases = _choose(plan, record, [q for q in questions if q in CASE_QUESTIONS], slides_per_case)
    _claim(home, record)
    files = write_mosaics(plan, home, record, workers)
    # Part of the ids, so that cases of two mosaic folders can stand in one run.
    mark = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:6]
    cases = _cases(plan, files, asked, record, mark, names)
    if slides_per_case > 1:
        cases += several_cases(plan, files, asked_of_cases, record, mark, names.lesion)
    root = tiles.expanduser()
    root = (root if root.is_dir() else root.parent).resolve()
    write_lines(home / _CASES, [_portable(case, home) for case in cases])
    write_lines(
        home / _TRUTH, [_truth(mosaic, files[i], home, root, record["margin"]) for i, mosaic in enumerate(plan)]
    )
    return cases


def _labels(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _check(
    kind: str,
    mosaics: Mapping[str, int],
    questions: Sequence[str],
    labels: Sequence[str],
    at_least_one: Mapping[str, int],
    at_least_zero: Mapping[str, int],
    region_tiles: Sequence[int],
    quality: int,
) -> None:
    grid, slides_per_case = at_least_one["grid"], at_least_one["slides_per_case"]
    problems = []
    if kind not in ("field", "slide"):
        problems.append(f"kind is {kind!r}; use field or slide")
    for low, numbers in ((1, at_least_one), (0, at_least_zero)):
        for name, number in numbers.items():
            if not isinstance(number, int) or number < low:
                problems.append(f"{name} is {number!r}; give a whole number of at least {low}")
    for split, number in mosaics.items():
        if split not in SPLITS or not isinstance(number, int) or number < 0:
            problems.append(f"mosaics has {split}: {number!r}; give a number for {', '.join(SPLITS)}")
    if not any(mosaics.values()):
        problems.append("mosaics is empty; give the number for each split, such as {train: 800, test: 300}")
    known = QUESTIONS if slides_per_case == 1 else (*CASE_QUESTIONS, *QUESTIONS)
    for question in questions:
        if question not in known:
            problems.append(
                f"unknown question {question!r} with slides_per_case {slides_per_case!r}; use {', '.join(known)}"
            )
    if not questions or len(set(questions)) < len(questions):
        problems.append("questions is empty or names one twice")
    if len(set(labels)) < len(labels) or len(labels) < 2:
        problems.append(f"background and lesion need one label each at least, all different; given {list(labels)}")
    if not (
        len(region_tiles) == 2
        and all(isinstance(side, int) for side in region_tiles)
        and isinstance(grid, int)
        and can_hold(grid, (region_tiles[0], region_tiles[1]))
    ):
        problems.append(
            f"region_tiles {list(region_tiles)} with grid {grid!r}: give [smallest, largest] side of a region, the "
            "largest at most half the grid, the smallest so that two fit beside each other with a tile between"
        )
    if not isinstance(quality, int) or not 1 <= quality <= 100:
        problems.append(f"quality is {quality!r}; give 1 to 100")
    if problems:
        raise InputError([f"mosaic: {problem}" for problem in problems])


def _pools(
    source: Sequence[Case],
    facts: Mapping[str, FileFacts],
    labels: Sequence[str],
    splits: Mapping[str, int],
    tiles: str,
) -> dict[tuple[str, str], list[str]]:
    """Paths of the tiles by (split, label), sorted, each content once."""
    pools: dict[tuple[str, str], dict[str, str]] = {(split, label): {} for split in splits for label in labels}
    problems = []
    for case in sorted(source, key=lambda case: case.id):
        pool = pools.get((case.split, case.answer))
        if pool is None:
            continue
        path = case.images[0]
        if facts[path].width != facts[path].height:
            problems.append(f"{path}: {facts[path].width} x {facts[path].height} px; tiles of a mosaic are square")
        pool.setdefault(facts[path].digest, path)
    known = ", ".join(sorted({case.answer for case in source}))
    problems += [
        f"{tiles}: no tile with the label {label!r} in the split {split!r}; the labels are {known}, and splits come "
        "from the manifest or from val_fraction and test_fraction"
        for (split, label), pool in pools.items()
        if not pool
    ]
    if problems:
        raise InputError(problems)
    return {key: list(pool.values()) for key, pool in pools.items()}


def _resolution(
    source: Sequence[Case], facts: Mapping[str, FileFacts], mpp: float | None, tile_px: int
) -> float | None:
    """Micrometres per pixel of the mosaics; None where the tiles state none or differ."""
    found = set()
    for case in source:
        own = case.extra.get("mpp") if mpp is None else mpp
        found.add(None if own is None else round(own * facts[case.images[0]].width / tile_px, 4))
    return found.pop() if len(found) == 1 else None


def _claim(home: Path, record: Mapping[str, Any]) -> None:
    """Make the folder one of these mosaics; refuse one that holds others."""
    path = home / _RECORD
    if path.is_file():
        try:
            held = json.loads(path.read_text())
        except json.JSONDecodeError:
            held = {}
        differ = [key for key in record if held.get(key) != record[key]]
        if differ:
            changes = ", ".join(
                "tiles (other files or splits)"
                if key == "tiles"
                else f"{key} ({held.get(key)} there, {record[key]} now)"
                for key in differ
            )
            raise InputError(f"{home} holds mosaics made with other parameters: {changes}; give another folder")
        return
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise InputError(f"{home} exists and holds no mosaics; give an empty folder or a new one")
    home.mkdir(parents=True, exist_ok=True)
    write_lines(path, [record])


def _choose(
    plan: Sequence[Mosaic], record: Mapping[str, Any], questions: Sequence[str], size: int
) -> dict[str, set[int]]:
    """By question the mosaics of the plan that it is asked of, even within each split.

    Args:
        questions: all of single mosaics, or all of cases. size: mosaics of a case, of which the first is named.
    """
    asked: dict[str, set[int]] = {question: set() for question in questions}
    problems = []
    for split in record["mosaics"]:
        rows = [i for i, mosaic in enumerate(plan) if mosaic.split == split]
        layouts, seed = [plan[i].layout for i in rows], (ASKED, record["seed"], SPLITS.index(split))
        for question in questions:
            if size == 1:
                chosen = ask(question, layouts, seed)
            else:
                grouped = [layouts[at : at + size] for at in range(0, len(rows), size)]
                chosen = [size * at for at in ask_cases(question, grouped, record["kind"], seed)]
            asked[question] |= {rows[at] for at in chosen}
            if not chosen:
                problems.append(
                    f"mosaic: {len(rows)} {split} mosaics are too few to ask {question!r} with more than one answer; "
                    f"raise mosaics.{split}, {20 if size == 1 else 6 * size} are enough"
                )
    if problems:
        raise InputError(problems)
    return asked


def _cases(
    plan: Sequence[Mosaic],
    files: Sequence[Path],
    asked: Mapping[str, set[int]],
    record: Mapping[str, Any],
    mark: str,
    names: _Names,
) -> list[Case]:
    """Cases of all splits, mosaic by mosaic."""
    cases = []
    for i, mosaic in enumerate(plan):
        layout = mosaic.layout
        name = f"{mark}-{mosaic.split}-{mosaic.number:05d}"
        extra = {"mosaic": layout.kind, "regions": len(layout.regions), "area": round(layout.area, 4)}
        if record["mpp"] is not None:
            extra["mpp"] = record["mpp"]
        for question in (question for question, rows in asked.items() if i in rows):
            cases.append(
                Case(
                    id=f"{name}-{question}",
                    patient=name,
                    task="detection" if question == "boxes" else "choice",
                    prompt=prompt_of(question, record["kind"], names.lesion),
                    answer=answer_of(question, layout, record["margin"]),
                    images=(str(files[i]),) if record["kind"] == "field" else (),
                    slides=(str(files[i]),) if record["kind"] == "slide" else (),
                    options=options_of(question, names.tissues),
                    split=mosaic.split,
                    question=question,
                    extra=extra,
                )
            )
    return cases


def _portable(case: Case, home: Path) -> dict[str, Any]:
    """The row of a case with paths relative to the folder, as the `manifest` environment reads it."""
    row = case.to_dict()
    for name in ("images", "slides"):
        if name in row:
            row[name] = [Path(path).relative_to(home).as_posix() for path in row[name]]
    return row


def _truth(mosaic: Mosaic, file: Path, home: Path, root: Path, margin: int) -> dict[str, Any]:
    layout = mosaic.layout
    return {
        "file": file.relative_to(home).as_posix(),
        "split": mosaic.split,
        "mosaic": layout.kind,
        "background": layout.background,
        "lesion": layout.lesion_label,
        "boxes": layout.boxes(margin),
        "area": round(layout.area, 4),
        "quadrant": layout.quadrant,
        "tiles": [Path(path).relative_to(root).as_posix() for path in mosaic.tiles],
    }
