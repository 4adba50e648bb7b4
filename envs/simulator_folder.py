"""A folder of simulated slides: drawn by several processes, continued when interrupted, re-used when complete.

params.json        what the slides were drawn from; another set of parameters is refused
slides/s00000.tif  ...
truth.jsonl        one row a slide: what is known about it, and how it was stained
truth.part.jsonl   the rows of a run in progress
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from frugalpath.envs.histology import draw_strip, make_specimen
from frugalpath.envs.pyramid import write_pyramid
from frugalpath.errors import InputError
from frugalpath.files import write_text

FORMAT = 3  # of the drawing: raised with every change that alters pictures or truth


@dataclass(frozen=True)
class SlideSpec:
    """One slide of a cohort: its number, its patient and what it is to show."""

    index: int
    patient: str
    diagnosis: str
    grade: int | None

    @property
    def name(self) -> str:
        """Base name of its file, which tells nothing but its number."""
        return f"s{self.index:05d}"


def fill_folder(
    root: Path, specs: Sequence[SlideSpec], *, seed: int, size_mm: float, mpp: float, workers: int
) -> list[dict[str, Any]]:
    """Draw the slides that are missing and return a row of truth for each spec, in order.

    Args:
        root: the folder, made when it is missing.
        specs: the slides wanted; others that are there stay.
        seed, size_mm, mpp: what the pictures depend on, see `frugalpath.envs.simulator.build`.
        workers: processes that draw.

    Raises:
        InputError: the folder holds slides of other parameters, or files that are not the simulator's.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{root}: is a file; name a folder for the simulated slides") from None
    with FileLock(root / ".lock"):
        _claim(root, {"format": FORMAT, "seed": seed, "size_mm": size_mm, "mpp": mpp})
        (root / "slides").mkdir(exist_ok=True)
        for left_over in (root / "slides").glob("*.part"):
            left_over.unlink()
        rows = {row["index"]: row for row in _read_rows(root) if (root / row["slide"]).is_file()}
        missing = [spec for spec in specs if spec.index not in rows]
        if missing:
            with (root / "truth.part.jsonl").open("a", encoding="utf-8") as journal:
                for row in _draw_all(root, missing, (seed, size_mm, mpp), workers):
                    journal.write(json.dumps(row) + "\n")
                    journal.flush()
                    rows[row["index"]] = row
        if missing or (root / "truth.part.jsonl").exists():
            write_text(root / "truth.jsonl", "".join(json.dumps(rows[index]) + "\n" for index in sorted(rows)))
            (root / "truth.part.jsonl").unlink(missing_ok=True)
    return [rows[spec.index] for spec in specs]


def _claim(root: Path, params: Mapping[str, Any]) -> None:
    """Write the parameters into an empty folder, or compare them with those it was filled with."""
    path = root / "params.json"
    if not path.exists():
        strangers = sorted(entry.name for entry in root.iterdir() if entry.name != ".lock" and entry.suffix != ".part")
        if strangers:
            raise InputError(
                f"{root}: holds {strangers[0]!r} and no params.json, so it is not a folder of simulated slides; "
                "name an empty or a new folder"
            )
        write_text(path, json.dumps(params) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: is not the simulator's; delete the folder {root} or name another")
    other = [f"{key} {found.get(key)!r} (now {value!r})" for key, value in params.items() if found.get(key) != value]
    if other:
        raise InputError(
            f"{root}: holds slides drawn with {', '.join(other)}; "
            "name another folder, delete this one, or use its values"
        )


def _read_rows(root: Path) -> Iterator[dict[str, Any]]:
    """Rows of the finished slides; the last line of an interrupted run counts only when it is whole."""
    for name in ("truth.jsonl", "truth.part.jsonl"):
        if (root / name).exists():
            for line in (root / name).read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)


def _draw_all(
    root: Path, specs: Sequence[SlideSpec], params: tuple[int, float, float], workers: int
) -> Iterator[dict[str, Any]]:
    """Rows of truth as the slides are done, in any order."""
    progress = tqdm(total=len(specs), desc="simulated slides", unit="slide", mininterval=1.0)
    with progress:
        if min(workers, len(specs)) == 1:
            for spec in specs:
                yield draw_slide(root, spec, *params)
                progress.update()
            return
        # Forked as torch's data loaders are: a spawned worker would import the whole training script again.
        method = "fork" if sys.platform == "linux" else "spawn"
        with ProcessPoolExecutor(min(workers, len(specs)), multiprocessing.get_context(method)) as pool:
            jobs = [pool.submit(draw_slide, root, spec, *params) for spec in specs]
            try:
                for job in as_completed(jobs):
                    yield job.result()
                    progress.update()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def draw_slide(root: Path, spec: SlideSpec, seed: int, size_mm: float, mpp: float) -> dict[str, Any]:
    """Draw one slide into `root/slides` and return its row of truth."""
    specimen = make_specimen((seed, spec.index), size_mm=size_mm, diagnosis=spec.diagnosis, grade=spec.grade)
    side = round(size_mm * 1000 / mpp)
    slide = f"slides/{spec.name}.tif"
    write_pyramid(
        root / slide,
        lambda top, rows: draw_strip(specimen, mpp, top, rows, side),
        width=side,
        height=side,
        mpp=mpp,
    )
    stain = specimen.stain
    return {
        "index": spec.index,
        "slide": slide,
        "patient": spec.patient,
        "width": side,
        "height": side,
        "truth": specimen.truth.as_dict(),
        "stain": {
            "matrix": [[round(float(value), 5) for value in row] for row in stain.matrix],
            "strength": [round(value, 5) for value in stain.strength],
            "white": [round(float(value), 3) for value in stain.white],
            "ink": stain.ink,
        },
    }
