"""Status of each slide: one JSON file per finished slide, and the table at the end of a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from frugalpath.files import write_text

DONE, FAILED, SKIPPED = "done", "failed", "skipped"


@dataclass
class SlideStatus:
    """Result of one slide.

    Attributes:
        id, file, case, stain: from the job.
        status: `done`; `failed`: asked for and not possible; `skipped`: not asked for.
        reason: reason if it is not done.
        tiles: how many tiles were encoded; `tissue_tiles` how many hold tissue (more, when capped).
        level0_mpp, mpp_source: the slide's scale and its source.
        level, level_mpp: the level that was read.
        backend: reading library.
        notes: notes on a slide that is done.
        seconds: total time of this slide.
        options: options that determine feature values.
        inputs: what else the result depends on: the file and its settings.
        again: taken from an earlier run (not stored).
    """

    id: str
    file: str
    case: str = ""
    stain: str = ""
    status: str = FAILED
    reason: str = ""
    tiles: int = 0
    tissue_tiles: int = 0
    level0_mpp: float | None = None
    mpp_source: str | None = None
    level: int | None = None
    level_mpp: float | None = None
    backend: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    again: bool = False

    def stored(self) -> dict[str, Any]:
        """Fields to store."""
        return {key: value for key, value in asdict(self).items() if key != "again"}


def write_status(path: Path, status: SlideStatus) -> None:
    """Write a status file atomically."""
    write_text(path, json.dumps(status.stored(), indent=1, ensure_ascii=False) + "\n")


def read_status(path: Path) -> SlideStatus | None:
    """Read a status file; None if it is missing or of another version."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return None  # half a file of a copy that broke off: the slide is done again
    known = {item.name for item in fields(SlideStatus)}
    if not isinstance(values, dict) or not {"id", "file", "status"} <= values.keys() <= known:
        return None
    return SlideStatus(**values)


def file_identity(path: Path) -> str:
    """Size and a hash of both ends of a file: it survives copying, where a modification time does not."""
    edge = 64 * 1024
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(edge))
            file.seek(max(edge, size - edge))
            digest.update(file.read(edge))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{size}-{digest.hexdigest()[:16]}"


def write_summary(path: Path, statuses: Iterable[SlideStatus]) -> None:
    """Write one line of JSON per slide."""
    lines = [json.dumps(status.stored(), ensure_ascii=False) for status in statuses]
    write_text(path, "\n".join(lines) + "\n")


def table(statuses: Sequence[SlideStatus], limit: int = 60) -> str:
    """Format the summary: every slide, or, with more than `limit`, those that are not done or have a note."""
    shown = [s for s in statuses if len(statuses) <= limit or s.status != DONE or s.notes]
    rows = [("slide", "status", "tiles", "mpp", "s", "")]
    for status in shown:
        source = (status.mpp_source or "").removeprefix("openslide.")
        mpp = f"{status.level0_mpp:.4g} {source}" if status.level0_mpp else ""
        rows.append(
            (
                status.id,
                status.status + (" before" if status.again else ""),
                str(status.tiles) if status.status == DONE else "",
                mpp,
                f"{status.seconds:.1f}",
                status.reason or "; ".join(status.notes),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def totals(statuses: Sequence[SlideStatus]) -> str:
    """Format the numbers of slides done, failed and skipped, and of tiles, as one line."""
    counts = {kind: sum(s.status == kind for s in statuses) for kind in (DONE, FAILED, SKIPPED)}
    tiles = sum(s.tiles for s in statuses if s.status == DONE)
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    if statuses and all(s.again for s in statuses):
        return f"nothing to do: {text}, {tiles} tiles, all from earlier runs (--retry retries failed slides)"
    return f"{text}, {tiles} tiles"
