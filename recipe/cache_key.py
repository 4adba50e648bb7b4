"""What a finished or half-finished stage, table or fit depends on: it is used again only where all of that is equal.

A key has the settings of the recipe that change the result, and under `contents` digests of what the recipe only
names: the rows and files of the cases, and the user's own reward and environment files. A folder that was written
before these were kept is judged by its settings alone.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from frugalpath.recipe.checkpoints import CONTENTS
from frugalpath.recipe.data import RunData, sha256_of
from frugalpath.recipe.run import Run
from frugalpath.slides.content import file_digests
from frugalpath.user_code import current_name

NEUTRAL = {
    "output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "logging_steps", "save_steps",
    "save_strategy", "save_total_limit", "resume_from_checkpoint", "log_level", "logging_strategy",
    # These follow from the number of processes; a finished run may be evaluated on any.
    "generation_batch_size", "use_cpu", "local_rank",
}  # fmt: skip
"""Keys of the GRPO arguments that do not change the result of a run."""

LOGGED = {
    "log_completions": False, "log_multimodal": True, "num_completions_to_print": None, "log_unique_prompts": False,
    "log_completions_hub_repo": None, "logging_first_step": False,
    # Where vLLM runs.
    "vllm_mode": "colocate", "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0", "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0, "vllm_group_port": 51216, "vllm_gpu_memory_utilization": 0.3,
    "vllm_max_model_length": None, "vllm_tensor_parallel_size": 1, "vllm_enable_sleep_mode": False,
}  # fmt: skip
"""Further such keys; what a stage is known by has them at these values, their defaults."""

AFTER = ("form", "weight_decay", "look_state", "look_confidence")
"""Keys of the allocator, two of them removed, that the joint step does not read, as those that begin with `fit_`."""

MODE_ALONE = {"joint": ("mode", "alternate_every"), "alternating": (), "sequential": ("alternate_every",)}
"""Keys that a mode does not depend on; runs in the first one are known without its name."""


def sft_key(data: RunData, count: int | None = None) -> dict[str, Any]:
    """What the first `count` stages of `sft` depend on, by default all of them."""
    run = data.run
    stages = run.sft if count is None else run.sft[:count]
    return {
        "cases": run.cases,
        "questions": run.questions,
        "encoder": run.encoder.identity(),
        "performer": dataclasses.asdict(run.performer),
        "ladder": run.ladder,
        "sft": [dataclasses.asdict(stage) for stage in stages],
        "balance": run.balance,
        "seed": run.grpo.seed,
        **({"form": "text"} if run.allocator.form == "text" else {}),
        **({"missing_slides": sorted(data.bank.missing)} if data.bank.missing else {}),
        CONTENTS: {"training cases": data.digest("train")},
    }


def grpo_key(data: RunData) -> dict[str, Any]:
    """What the joint stage depends on."""
    run = data.run
    left_out = {*NEUTRAL, *MODE_ALONE[run.grpo.mode]}
    grpo = {k: v for k, v in run.grpo.to_dict().items() if k not in left_out} | LOGGED
    online = {k: v for k, v in run.allocator.settings().items() if not k.startswith("fit_") and k not in AFTER}
    if run.allocator.form == "policy":
        online["form"] = "policy"  # of another network; the others learn values in the joint step
    if run.allocator.form == "text" and run.grpo.mode == "sequential":
        online = {}  # its adapter comes after, and no network learns
    key = sft_key(data)
    key[CONTENTS] = key[CONTENTS] | {"reward files": reward_digest(run)}
    return {**key, "rewards": [_scoring(r) for r in run.rewards], "grpo": grpo, "allocator": online}


def reward_digest(run: Run) -> str:
    """SHA-256 of the user's own files that `rewards` names."""
    files: list[str] = []
    for entry in run.rewards:
        name, params = (entry.get("name", ""), entry.get("params")) if isinstance(entry, dict) else (entry, None)
        module = str(name).rpartition(":")[0]
        if module and not module.endswith(".py"):
            spec = find_spec(current_name(module))
            module = spec.origin or "" if spec else ""
        files += [file for n in (module, *_texts(params)) if n for file in _files(n, run.base)]
    digests, _ = file_digests(files)
    return sha256_of([digests.get(file) for file in files])


def _files(name: str, base: Path) -> list[str]:
    """Files of that name, beside the recipe and in the working folder: whichever is read is among them."""
    paths = (folder / Path(name).expanduser() for folder in (base, Path.cwd()))
    try:
        return list(dict.fromkeys(str(path) for path in paths if path.is_file()))
    except (OSError, ValueError):  # a text that cannot be a name, too long or with a zero byte
        return []


def _texts(params: Any) -> list[str]:
    """Texts among parameters, at any depth; some name files."""
    if isinstance(params, str):
        return [params]
    inner = params.values() if isinstance(params, dict) else params if isinstance(params, list | tuple) else ()
    return [text for value in inner for text in _texts(value)]


def _scoring(reward: Any) -> Any:
    """An entry of `rewards` without the keys that change how it runs but not what it gives."""
    return {k: v for k, v in reward.items() if k not in ("workers", "timeout")} if isinstance(reward, dict) else reward
