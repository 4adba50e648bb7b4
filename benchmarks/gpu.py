"""All that needs a GPU, measured by one command, most valuable first.

    python benchmarks/gpu.py --minutes 8 --out runs/gpu
    python benchmarks/gpu.py --rehearse --out runs/gpu_rehearsal     # all of it in small, on a CPU
    python benchmarks/gpu.py --table runs/gpu                        # puts the figures into docs/gpu.md

Each part runs in a process of its own, with a time limit of its own. What it measures is appended to OUT/gpu.jsonl
and on the disk at once, a line with `status: measured`, so that a machine that is taken away leaves it; a further line
says how the part ended: done, failed (with its last lines), over its limit, no time left, or not run, and why.
OUT/gpu.log has what the parts printed. The exit status is 0 where all parts that could run succeeded, else 1.

Weights are random, in the shapes of Qwen2.5-VL-3B and 7B: no network is needed. `benchmarks/gpu.md` says how to take
it to a machine without one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts.plan import PARTS, ROOT, chosen
from benchmarks.gpu_parts.running import BAD, Lines, run
from benchmarks.gpu_parts.table import summary, write

CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Of a rehearsal."""


def parse() -> argparse.Namespace:
    """The command line."""
    listed = "\n".join(f"  {p.group}  {p.name:16} about {p.seconds:3.0f} s, at most {p.limit:3.0f} s" for p in PARTS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"parts, in the order in which they run:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of gpu.jsonl and gpu.log")
    parser.add_argument("--minutes", type=float, help="for all parts together (8; 6 of a rehearsal)")
    parser.add_argument("--parts", help="letters or names of parts, such as a,b,f; default: all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU; the figures say nothing")
    parser.add_argument("--scratch", type=Path, help="folder for weights, up to 25 GB; emptied (OUT/scratch)")
    parser.add_argument("--commit", help="of this code, where there is no git")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="put a run's figures into docs/gpu.md and stop")
    return parser.parse_args()


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it; None without git."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=9"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.strip() or None


def main() -> None:
    """Run the parts and print a summary."""
    options = parse()
    if options.table:
        write(options.table)
        return
    parts = chosen(options.parts)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    path, scratch = out / "gpu.jsonl", (options.scratch or out / "scratch").absolute()
    if path.exists():
        raise SystemExit(f"{path} is there already; name another --out, or remove it")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    os.environ["TMPDIR"] = str(scratch)
    if options.rehearse:
        os.environ.update(CPU)
    # With several GPUs transformers would divide batches over them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)  # on the way out the part is ended

    signal.signal(signal.SIGTERM, end)
    lines = Lines(path, {"rehearsal": options.rehearse})
    seconds = 60 * (options.minutes or (6 if options.rehearse else 8))
    try:
        run(parts, lines, out, scratch, seconds, options.rehearse, options.commit or commit())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        print(summary(lines.found))
    if any(line["status"] in BAD for line in lines.found):
        sys.exit(1)


if __name__ == "__main__":
    main()
