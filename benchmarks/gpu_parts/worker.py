"""The process of one part: imports what it needs, waits for its orders on stdin, and writes lines to a pipe.

    python -m benchmarks.gpu_parts.worker MODULE PIPE

It is started while the part before it runs, so that importing takes no time of the GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gpu_parts.task import Task


def main() -> None:
    """Run a part."""
    module, pipe = sys.argv[1], int(sys.argv[2])
    part = importlib.import_module(f"benchmarks.gpu_parts.{module}")
    for name in getattr(part, "IMPORTS", ()):
        importlib.import_module(name)
    orders = sys.stdin.readline()
    if not orders:
        return  # it was not needed, or the run has ended
    for found in part.run(Task(**json.loads(orders))):
        os.write(pipe, (json.dumps(found) + "\n").encode())


if __name__ == "__main__":
    main()
