"""Find the slides to extract: a folder, a manifest, one file or a list of paths."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openslide
import pandas as pd

from frugalpath.errors import InputError
from frugalpath.slides.scale import MAX_MPP, MIN_MPP, plausible

# What OpenSlide's formats are called; other files of a folder are no slides.
SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".dcm", ".czi", ".avs"}
)
MANIFESTS = (".csv", ".tsv", ".jsonl", ".parquet")
_HE = {"he", "hande", "hematoxylinandeosin", "haematoxylinandeosin", "hematoxylineosin", "haematoxylineosin"}


@dataclass(frozen=True)
class SlideJob:
    """One slide to extract.

    Attributes:
        file: the slide.
        id: names its outputs; may hold sub-folders. The file's name without its suffix where it is empty.
        case: groups the slides of one case.
        stain: as in the manifest; empty if unknown.
        mpp: level-0 microns per pixel for a file that records none.
    """

    file: Path
    id: str = ""
    case: str = ""
    stain: str = ""
    mpp: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", Path(self.file))
        object.__setattr__(self, "id", self.id or self.file.stem)


def stain_key(stain: str) -> str:
    """Normalise the spellings of a stain: `H&E`, `HE`, `Hematoxylin and eosin` become `he`."""
    key = "".join(char for char in stain.lower() if char.isalnum())
    return "he" if key in _HE else key


def find_jobs(source: str | os.PathLike, *, allow_outside: bool = False) -> list[SlideJob]:
    """Find the slides of a folder (with its sub-folders), of a manifest, or one slide.

    A manifest is csv, tsv, jsonl or parquet with the column `file` (or `slide`) and, as wanted, `id`, `case`, `stain`
    and `mpp`. A file `slides.csv` (or .tsv, .jsonl, .parquet) in a folder tells these of the slides that it names.

    Args:
        allow_outside: let rows name slides outside of the manifest's folder.

    Raises:
        InputError: nothing there, a bad manifest (all its problems at once), or two slides with one id.
    """
    source = Path(source)
    if source.is_dir():
        jobs = _folder(source, allow_outside)
    elif not source.exists():
        raise InputError(f"--slides {source}: no such file or folder")
    elif source.suffix.lower() in MANIFESTS:
        jobs = read_jobs(source, allow_outside=allow_outside)
    else:
        jobs = [SlideJob(source)]
    if not jobs:
        raise InputError(f"--slides {source}: no slides there (known suffixes: {' '.join(sorted(SUFFIXES))})")
    check_ids(jobs)
    return jobs


def as_jobs(slides: Iterable[SlideJob | str | os.PathLike]) -> list[SlideJob]:
    """Convert paths to jobs; raise InputError for duplicate ids."""
    jobs = [slide if isinstance(slide, SlideJob) else SlideJob(Path(slide)) for slide in slides]
    check_ids(jobs)
    return jobs


def check_ids(jobs: Sequence[SlideJob]) -> None:
    """Raise InputError if two slides have the same output or an id leaves the output folder."""
    problems = []
    files = defaultdict(list)
    for job in jobs:
        files[job.id].append(str(job.file))
        if Path(job.id).is_absolute() or ".." in Path(job.id).parts:
            problems.append(f"{job.file}: id {job.id} leaves the output folder")
    for key, names in files.items():
        if len(names) > 1:
            problems.append(
                f"id {key} belongs to {', '.join(names)}: one would overwrite the other; list each slide once, and "
                "tell different ones apart by a column id in the manifest"
            )
    if problems:
        raise InputError(problems)


def read_jobs(path: Path, *, allow_outside: bool = False) -> list[SlideJob]:
    """Read the rows of a manifest; paths are relative to it and must stay in its folder unless allowed."""
    table = _table(path)
    column = next((name for name in ("file", "slide") if name in table.columns), None)
    if column is None:
        raise InputError(f"{path}: no column `file` (found {', '.join(map(str, table.columns)) or 'none'})")
    problems, jobs = [], []
    root = path.parent
    for number, row in enumerate(table.to_dict("records"), start=1):
        values = {key: _text(row.get(key)) for key in (column, "id", "case", "stain", "mpp")}
        name, where = values[column], f"{path}, row {number}"
        if not Path(name).name:
            problems.append(f"{where}: {column} is empty")
            continue
        relative = not Path(name).is_absolute()
        file = root / name if relative else Path(name)
        try:
            leaves = not file.resolve().is_relative_to(root.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # too long, a ring of links, not to be written as bytes
            problems.append(f"{where}: {name[:80]!r} is not a path ({error})")
            continue
        if leaves and not allow_outside:
            problems.append(f"{where}: {name} leaves the manifest's folder; set --allow_outside if you trust it")
        mpp, problem = _mpp(values["mpp"])
        if problem:
            problems.append(f"{where}: {problem}")
        key = values["id"] or (Path(name).with_suffix("").as_posix() if relative else file.stem)
        jobs.append(SlideJob(file, key, values["case"], values["stain"], mpp))
    if problems:
        raise InputError(problems)
    return jobs


def _folder(folder: Path, allow_outside: bool) -> list[SlideJob]:
    known: dict[Path, SlideJob] = {}
    for suffix in MANIFESTS:
        manifest = folder / f"slides{suffix}"
        if manifest.is_file():
            known = {job.file.resolve(): job for job in read_jobs(manifest, allow_outside=allow_outside)}
            break
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    jobs = [
        known.get(file.resolve()) or SlideJob(file, file.relative_to(folder).with_suffix("").as_posix())
        for file in _one_per_series(files)
    ]
    present = {job.file.resolve() for job in jobs}
    # A slide that is listed and absent is reported like any other that cannot be read.
    return jobs + [job for file, job in known.items() if file not in present]


def _one_per_series(files: Sequence[Path]) -> list[Path]:
    """Drop DICOM files that belong to a slide already listed: each file of a series opens the whole slide."""
    instances = defaultdict(list)
    for file in files:
        if file.suffix.lower() == ".dcm":
            instances[file.parent].append(file)
    dropped = set()
    for group in instances.values():
        seen = set()
        for file in group if len(group) > 1 else []:
            try:
                with openslide.OpenSlide(str(file)) as slide:
                    series = slide.properties.get("dicom.SeriesInstanceUID")
            except openslide.OpenSlideError:
                continue  # kept, so that its reason is reported
            if series is not None and series in seen:
                dropped.add(file)
            seen.add(series)
    return [file for file in files if file not in dropped]


def _table(path: Path) -> pd.DataFrame:
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv" as suffix:
                return pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
            case ".jsonl":
                return pd.read_json(path, lines=True, dtype=False)
            case _:
                return pd.read_parquet(path)
    # Parse errors of pandas and pyarrow are ValueErrors, but for what they pass on of broken files.
    except (ValueError, OSError, OverflowError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error


def _text(value: object) -> str:
    if isinstance(value, list | dict | np.ndarray):
        value = None  # a cell of a table of slides is no list
    return "" if value is None or pd.isna(value) else str(value).strip()


def _mpp(text: str) -> tuple[float | None, str | None]:
    if not text:
        return None, None
    try:
        mpp = float(text)
    except ValueError:
        return None, f"mpp {text!r} is not a number"
    if not plausible(mpp):
        return None, f"mpp {text} is outside {MIN_MPP} to {MAX_MPP:g}"
    return mpp, None
