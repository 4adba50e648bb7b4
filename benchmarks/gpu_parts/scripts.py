"""A benchmark that is a script of its own: its JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_parts.task import Task, command


def run(task: Task) -> Iterator[dict[str, Any]]:
    """Each JSON object that it prints; there is at least one."""
    settings = task.settings
    arguments = [settings["script"], "--device", task.device, *settings["options"]]
    out = command([sys.executable, "-W", "ignore", *arguments], merged=False)
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if not found:
        raise RuntimeError(f"{settings['script']} printed no JSON line")
    for line in found:
        yield {"case": line.get("shape") or " ".join(arguments), **line}
