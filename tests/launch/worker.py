"""Processes of a launch without a GPU: a run, as `rl/grpo.py` begins it, one that is stopped and resumed, and others.

accelerate launch ... tests/launch/worker.py <recipe> [<recipe> <the same in another output_dir> [<recipe> ...]]
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from frugalpath.recipe.checkpoints import DONE
from frugalpath.recipe.data import load_data
from frugalpath.recipe.run import parse_recipe
from frugalpath.rl.pipeline import train_joint


def share_out_on_cpu() -> None:
    """Lets Accelerate set up DeepSpeed and FSDP over gloo; by itself it does so on accelerators only."""
    begin = AcceleratorState.__init__

    def on_cpu(self: Any, *args: Any, deepspeed_plugin: Any = None, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        fresh = not AcceleratorState._shared_state
        begin(self, *args, deepspeed_plugin=deepspeed_plugin, fsdp_plugin=fsdp_plugin, **kwargs)
        if not fresh:
            return
        if deepspeed_plugin is not None:
            self.distributed_type = DistributedType.DEEPSPEED
            deepspeed_plugin.set_mixed_precision("no")
            deepspeed_plugin.select(_from_accelerator_state=True)
            self.deepspeed_plugins = deepspeed_plugin
        elif fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = on_cpu
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        build_nothing()


def build_nothing() -> None:
    """Leaves out the operator that DeepSpeed compiles for the processes of one machine's CPU; gloo does its work."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stop(whole: Path, cut: Path) -> None:
    """Copies a run as it was when it had written the first of its checkpoints."""
    if PartialState().is_main_process:
        shutil.copytree(whole, cut)
        (cut / "grpo" / DONE).unlink()
        for path in ("model.safetensors", "allocator/model.safetensors"):
            (cut / "grpo" / path).unlink()
        first, *later = sorted((cut / "grpo").glob("checkpoint-*"))
        assert first.name == "checkpoint-2" and later
        for folder in later:
            shutil.rmtree(folder)
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    share_out_on_cpu()
    runs = []
    for path in sys.argv[1:]:
        runs.append(parse_recipe(["--config", path]))
        if len(runs) == 3:
            stop(runs[1].folder, runs[2].folder)
        train_joint(load_data(runs[-1]))
