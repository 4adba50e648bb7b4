"""Which checkpoint is whole, which stage is done, and by which recipe."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from slides.errors import InputError
from slides.whole import write_text

DONE = "done.json"
WHOLE = "complete"


class MarkWhole(TrainerCallback):
    """Mark a checkpoint after its last file is written, so that a killed run never resumes from half of one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def last_whole(folder: Path) -> str | None:
    """The newest whole checkpoint of a trainer's folder."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / WHOLE).is_file():
            found[int(match[1])] = str(path)
    return found[max(found)] if found else None


def fingerprint(parts: dict[str, Any]) -> str:
    """Short hash of what a stage depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_done(folder: Path, parts: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished stage recorded, or None if it has still to run.

    Raises:
        InputError: the folder was made by other settings; the message names them.
    """
    path = folder / DONE
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    if record["fingerprint"] != fingerprint(parts):
        before = record["parts"]
        now = json.loads(json.dumps(parts, default=str))
        changed = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
        raise InputError(
            f"{folder}: was made with other settings ({', '.join(changed)}); "
            "choose another output_dir or delete the folder"
        )
    return record


def mark_done(folder: Path, parts: dict[str, Any], **record: Any) -> None:
    """Record that a stage is finished; the last thing that is written, atomically."""
    content = {"fingerprint": fingerprint(parts), "parts": parts, **record}
    write_text(folder / DONE, json.dumps(content, indent=1, default=str) + "\n")
