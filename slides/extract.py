"""Extract patch features from slides.

    frugalpath extract --slides slides/ --out features/
    accelerate launch --multi_gpu --num_processes 2 slides/extract.py --slides slides.csv --out features/
    frugalpath extract --config extract.yaml

`--slides` is a folder, a manifest (csv, tsv, jsonl or parquet with the column file and optionally id, case, stain,
mpp) or one slide. `--out` receives `features/`, `status/`, `qc/`, `geojson/` and `extract.jsonl`. Exit status: 0 if
the run finished, even if some slides could not be read (they are listed with reasons); 2 for bad arguments or if no
slide could be extracted. See docs/slides.md.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

if not __package__:  # launched as a file: Python put slides/ first on the path, where its modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

# Reading threads share the cores with the encoder's. Waiting OpenMP threads that spin would take them from both: the
# encoder was eight times slower beside other work. It must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from frugalpath.errors import InputError, entry
from frugalpath.slides.extraction import Outputs, extract_slides
from frugalpath.slides.jobs import SlideJob, find_jobs
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.status import DONE, FAILED, SlideStatus, read_status, table, totals, write_summary

__all__ = ["ExtractOptions", "SlideJob", "SlideStatus", "extract_slides", "find_jobs"]


@dataclass
class ExtractArguments(ExtractOptions):
    """Command-line arguments."""

    slides: str = field(default="", metadata={"help": "folder, manifest or one slide"})
    out: str = field(default="", metadata={"help": "output folder"})
    allow_outside: bool = field(default=False, metadata={"help": "allow manifest paths outside its folder"})
    device: str = field(
        default="auto",
        metadata={"help": "device of the encoder: auto (one GPU per process, if any), cpu, cuda, cuda:1"},
    )


def parse(arguments: list[str] | None = None) -> ExtractArguments:
    """Parse the command line and the YAML file of `--config`; raise InputError for unknown YAML keys."""
    from trl import TrlParser

    parser = TrlParser(dataclass_types=[ExtractArguments], description=(__doc__ or "").partition("\n")[0])
    try:
        (found,) = parser.parse_args_and_config(arguments)
    except (ValueError, OSError) as error:
        raise InputError(f"--config: {error}") from error
    missing = [f"--{name}: missing" for name in ("slides", "out") if not getattr(found, name)]
    if missing:
        raise InputError(missing)
    return found


@entry
def main() -> None:
    """Run the command line."""
    arguments = parse()
    arguments.check()
    jobs = find_jobs(arguments.slides, allow_outside=arguments.allow_outside)
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file, not a folder")

    import torch
    from accelerate import PartialState

    # The others wait for the process with the longest share, which may take days.
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Without an accelerator several processes talk through gloo; each has its share all the same.
    cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, **({"timeout": timedelta(days=30)} if distributed else {}))
    statuses = extract_slides(
        jobs,
        out,
        arguments,
        device=str(state.device) if arguments.device == "auto" else arguments.device,
        rank=state.process_index,
        world=state.num_processes,
        progress=state.is_main_process,
    )
    state.wait_for_everyone()
    if state.is_main_process:
        report(jobs, out, statuses)
    if distributed:
        state.destroy_process_group()


def report(jobs: list[SlideJob], out: Path, own: list[SlideStatus]) -> None:
    """Write `extract.jsonl` and print the table; raise InputError if no slide has features."""
    found = {status.id: status for status in own}
    outputs = Outputs(out)
    for job in jobs:
        if job.id not in found:  # another process's share
            status = read_status(outputs.status(job.id))
            if status is None:
                raise RuntimeError(f"{job.file}: the process that had this slide left no status")
            found[job.id] = status
    statuses = [found[job.id] for job in jobs]
    write_summary(out / "extract.jsonl", statuses)
    print(table(statuses))
    print(f"{totals(statuses)}; {out / 'extract.jsonl'}")
    if not any(status.status == DONE for status in statuses):
        failed = [status for status in statuses if status.status == FAILED]
        why = f"{failed[0].id}: {failed[0].reason}" if failed else statuses[0].reason
        raise InputError(f"no slide could be extracted; the table lists each reason and remedy, such as {why}")


if __name__ == "__main__":
    main()
