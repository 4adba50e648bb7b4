"""Which checkpoint is whole, which stage is done, and by which recipe.

Training that goes on from a checkpoint, of any trainer.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainerCallback

from frugalpath.errors import InputError
from frugalpath.files import write_text

DONE = "done.json"
STARTED = "started.json"
"""What a stage that is not finished depends on."""
CONTENTS = "contents"
"""Part of a key with the digests of what a recipe only names: cases and files."""
WHOLE = "complete"


class Clock:
    """Wall seconds of a stage, those before it was resumed with them.

    Args:
        resumed: the checkpoint that it goes on from.
    """

    def __init__(self, resumed: str | None = None):
        spent = (Path(resumed) / WHOLE).read_text() if resumed else ""
        self._start = time.perf_counter() - float(spent or 0)

    @property
    def seconds(self) -> float:
        """So far."""
        return time.perf_counter() - self._start

    def mark(self, checkpoint: Path) -> None:
        """Mark a checkpoint whose last file is written as whole."""
        write_text(checkpoint / WHOLE, f"{self.seconds}\n")


class MarkWhole(TrainerCallback):
    """Mark a checkpoint after its last file is written, so that a killed run never resumes from half of one.

    Only then are earlier ones dropped: the trainer itself would do so before, when none may be whole any more.

    Args:
        clock: of the stage.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self.most: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.most, args.save_total_limit = args.save_total_limit, None
        if state.global_step and state.is_world_process_zero:
            print(f"{args.output_dir}: goes on after step {state.global_step} of {state.max_steps}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        PartialState().wait_for_everyone()  # each writes files of its own: random states, parts of sharded weights
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        self.clock.mark(folder / f"checkpoint-{state.global_step}")
        found = {step: path for step, path in checkpoints(folder).items() if step <= state.global_step}
        whole = [step for step in sorted(found) if (found[step] / WHOLE).is_file()]
        kept = set(whole[-self.most :] if self.most else whole)
        for step in found.keys() - kept:
            if str(found[step]) != state.best_model_checkpoint:
                (found[step] / WHOLE).unlink(missing_ok=True)  # first, since half of it may stay
                shutil.rmtree(found[step])


class SaveBetweenRollouts(TrainerCallback):
    """Put a checkpoint off until the rollouts at hand are used up, all but the last one of a training.

    It does not hold them: a run that went on from it would make new ones.

    Args:
        used_up: whether the next step makes rollouts.
    """

    def __init__(self, used_up: Callable[[], bool]):
        self.used_up = used_up
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.due |= control.should_save
        control.should_save = self.due and (self.used_up() or control.should_training_stop)
        self.due &= not control.should_save


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints of a trainer's folder by their steps, whole ones and others."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}


def last_whole(folder: Path) -> str | None:
    """The newest whole checkpoint of a trainer's folder."""
    found = {step: path for step, path in checkpoints(folder).items() if (path / WHOLE).is_file()}
    return str(found[max(found)]) if found else None


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Short hash of the settings that a stage depends on; digests of contents are compared by themselves."""
    settings = {k: v for k, v in parts.items() if k != CONTENTS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_done(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished stage recorded, or None if it has still to run.

    Args:
        key: what it depends on, see `frugalpath.recipe.cache_key`.

    Raises:
        InputError: the folder was made by other settings or from other data; the message names them.
    """
    if not (folder / DONE).is_file():
        return None
    return _same(folder, DONE, key)


def mark_started(folder: Path, key: Mapping[str, Any]) -> None:
    """Record what a stage that begins depends on; one that goes on must depend on the same.

    Raises:
        InputError: checkpoints are there that other settings or other data have made.
    """
    state = PartialState()
    if (folder / STARTED).is_file() and checkpoints(folder):
        _same(folder, STARTED, key)
    elif state.is_main_process:
        _record(folder / STARTED, key)
    state.wait_for_everyone()


def _same(folder: Path, name: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record, which must be of this key."""
    record = json.loads((folder / name).read_text())
    before, now = record["parts"], json.loads(json.dumps(key, default=str))
    changed: list[str] = []
    if record["fingerprint"] != fingerprint(key):
        changed = sorted(k for k in {*before, *now} - {CONTENTS} if before.get(k) != now.get(k))
    kept, found = before.get(CONTENTS, {}), now.get(CONTENTS, {})
    other = sorted(k for k in kept.keys() & found.keys() if kept[k] != found[k])
    if changed or other:
        begun = "was made" if name == DONE else "holds checkpoints of a training"
        how = [*([f"with other settings ({', '.join(changed)})"] if changed else [])]
        how += [f"from other {', '.join(other)} (they have changed since)"] if other else []
        raise InputError(
            f"{folder}: {begun} {' and '.join(how)}; choose another output_dir, delete the folder, or set them back"
        )
    return record


def stage_seconds(run: Path) -> dict[str, float]:
    """Wall seconds of the finished stages of a run, by their folders."""
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(run.glob(f"*/{DONE}"))}
    return {name: record["seconds"] for name, record in records.items() if "seconds" in record}


def mark_done(folder: Path, key: Mapping[str, Any], **record: Any) -> None:
    """Record that a stage is finished; the last thing that is written, atomically."""
    _record(folder / DONE, key, **record)
    (folder / STARTED).unlink(missing_ok=True)


def _record(path: Path, key: Mapping[str, Any], **record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": fingerprint(key), "parts": key, **record}
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


class _AllTrained(Exception):
    """The checkpoint is of the last step."""


class _NoStepMore(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, with weights and state of the checkpoint in place."""
        if state.global_step >= state.max_steps:
            raise _AllTrained


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint on if there is one.

    From one of the last step nothing is trained: transformers would take a step more where that is amid an epoch.
    On a CPU the same training gives the same weights, bit for bit, with any one number of threads (`repeatable`).

    Args:
        checkpoint: its folder.
    """
    trainer.add_callback(_NoStepMore())
    with repeatable():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except _AllTrained:
            trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


@contextmanager
def repeatable() -> Iterator[None]:
    """Sums whose order is fixed, where this is cheap: on a CPU.

    There one kernel of those tried adds in whatever order its threads come, that of the gradient of `x[rows]`; torch's
    deterministic one is no slower. On a GPU many kernels do, and their substitutes are slower or missing:
    `full_determinism` of the trainer's arguments asks for them, and is left as it is.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if torch.accelerator.is_available() or torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it makes errors visible, not results the same
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
