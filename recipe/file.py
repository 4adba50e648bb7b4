"""Read a recipe's file and command line, before its sections are checked.

Removed keys of `allocator` are ignored at their former default, and rejected otherwise.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser

from frugalpath.errors import InputError, removed
from frugalpath.parsing import read_yaml
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.values import collect_errors, fits, plain_types, read, suggest

logger = logging.getLogger(__name__)

FORMER: dict[str, Any] = {"share": "equal", "look_state": None, "look_confidence": None}
"""Removed keys with their former defaults, which are still part of the key of a finished stage."""

PROBE = (
    "the performer's answer at a small budget cost about as much as it gained the network; remove the key, or set "
    "allocator.form to cascade, which uses the performer's own answers"
)
REASONS = {
    "share": "shares by attention and a budget for each slide were no better than equal shares at equal cost; remove "
    "the key, and the slides of a case share its budget equally",
    "look_state": PROBE,
    "look_confidence": PROBE,
}
"""Why they were removed, and what to do instead."""

IDLE = ("fit_splits",)
"""Keys that had an effect only with a removed one."""


FORMER_FORMS = {"escalate": "cascade"}
"""Names that forms of the allocator had, and have now."""


def with_present_names(allocator: Any) -> Any:
    """The `allocator` part with the present name of its form; a warning names it."""
    form = allocator.get("form") if isinstance(allocator, dict) else None
    if not isinstance(form, str) or form not in FORMER_FORMS:
        return allocator
    logger.warning("allocator.form: %s is called %s now; write that", form, FORMER_FORMS[form])
    return {**allocator, "form": FORMER_FORMS[form]}


def without_removed(allocator: Any, problems: list[str]) -> Any:
    """Drop removed keys from the `allocator` section, with a warning for those at their former default.

    Args:
        allocator: the section; anything but a mapping is returned as it is.
        problems: receives a line for every removed key with another value.
    """
    if not isinstance(allocator, dict):
        return allocator
    for key, value in allocator.items():
        if key in IDLE or (key in FORMER and value == FORMER[key]):
            logger.warning("allocator.%s no longer has an effect; remove it", key)
        elif key in FORMER:
            problems.append(removed(f"allocator.{key}: {value!r}", REASONS[key]))
    return {key: value for key, value in allocator.items() if key not in (*FORMER, *IDLE)}


@dataclass
class Recipe:
    """Settings of a run, besides TRL's GRPO arguments."""

    cases: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "environment: `name` (manifest, mosaic, simulator or your own) and its parameters"},
    )
    encoder: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of EncoderConfig"})
    performer: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of PerformerConfig"})
    ladder: list[int] = field(
        default_factory=lambda: [1, 4, 16, 49, 196], metadata={"help": "budgets in visual tokens"}
    )
    sft: Any = field(default_factory=dict, metadata={"help": "one stage or a list of them, see docs/training.md"})
    questions: list[str] | None = field(
        default=None,
        metadata={"help": "kinds of question used by GRPO and the report; others are used by sft stages only"},
    )
    balance: bool = field(
        default=False,
        metadata={"help": "repeat training cases so that the answers of each choice question are balanced"},
    )
    rewards: list[Any] = field(default_factory=lambda: ["choice", {"name": "format", "weight": 0.2}])
    allocator: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of AllocatorOptions"})
    evaluation: dict[str, Any] = field(default_factory=dict, metadata={"help": "keys of EvaluationOptions"})
    set: list[str] = field(
        default_factory=list, metadata={"help": "overrides of nested keys, such as cases.slides=40 sft.max_steps=10"}
    )


KNOWN = frozenset(f.name for cls in (Recipe, FrugalConfig) for f in dataclasses.fields(cls))
"""Keys of the top level."""
TYPES = {"balance": bool, "rewards": list[Any]}
"""Types of keys that are neither a section nor an argument of the trainer."""


AT_START = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "OMP_", "KMP_",
    "GOMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "PYTHON", "LD_", "HF_HOME", "HF_HUB_", "HF_DATASETS_",
    "TRANSFORMERS_OFFLINE",
)  # fmt: skip
"""Prefixes of variables that libraries read when they are loaded or look for devices."""


class _Parser(TrlParser):
    """TRL's parser, which reports errors as InputError."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError for an argument that cannot be read."""
        raise InputError(f"command line: {message}")


def config_of(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Split the recipe's path from the command line."""
    for at, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name == "--config":
            given = [value] if equals else argv[at + 1 : at + 2]
            return Path(given[0]) if given else None, argv[:at] + argv[at + 2 - bool(equals) :]
    return None, argv


def export(variables: dict[str, str], path: Path) -> None:
    """Set the environment variables of the recipe's `env`.

    Raises:
        InputError: a variable must be set before the program starts, and is not.
    """
    late = {k: v for k, v in variables.items() if k.startswith(AT_START) and os.environ.get(k) != v}
    if late:
        words = " ".join(f"{name}={shlex.quote(value)}" for name, value in late.items())
        raise InputError(
            f"{path}: env: {', '.join(late)} acts only before the program starts; take it out, and write it before "
            f"the command: {words} python ..."
        )
    os.environ.update(variables)


def content_of(path: Path | None, problems: list[str]) -> dict[str, Any]:
    """Read the keys and values of a recipe's file, without those added to `problems`."""
    if path is None:
        return {}
    if not path.is_file():
        raise InputError(f"{path}: no such recipe; see configs/recipes")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys to values")
    variables = content.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise InputError(f"{path}: env: expected a mapping of variables to values, got {variables!r}")
    export({str(name): str(value) for name, value in variables.items()}, path)
    types = plain_types(FrugalConfig) | TYPES
    kept: dict[str, Any] = {}
    for key, value in content.items():
        if key not in KNOWN:
            problems.append(f"{path}: unknown key {key!r}{suggest(key, KNOWN)}")
            continue
        with collect_errors(problems):
            # A switch written as text is parsed as on the command line.
            as_it_is = key not in types or (isinstance(value, str) and not fits(0, types[key]) and key not in TYPES)
            kept[key] = value if as_it_is else read(value, types[key], f"{path}: {key}")
    return kept


def parsed(
    content: dict[str, Any], argv: list[str], path: Path | None, problems: list[str]
) -> tuple[Recipe, FrugalConfig | None]:
    """Parse the recipe and the trainer's arguments; these are None if there are problems."""
    parser = _Parser([Recipe, FrugalConfig])
    parser.set_defaults_with_config(**content)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        named = [a for a in unknown if a.startswith("--")] or unknown
        problems += [f"command line: unknown argument {a}{suggest(a.lstrip('-'), KNOWN)}" for a in named]
    recipe, grpo = (
        {f.name: getattr(found, f.name) for f in dataclasses.fields(cls) if f.init} for cls in (Recipe, FrugalConfig)
    )
    if path is None and not recipe["set"] and not recipe["cases"]:
        raise InputError([*problems, "give a recipe: --config configs/recipes/demo.yaml, or your own"])
    if problems:
        return Recipe(**recipe), None  # the other arguments may depend on those left out
    try:
        return Recipe(**recipe), FrugalConfig(**grpo)
    except (ValueError, TypeError) as error:
        problems.append(f"{path or 'command line'}: {error}")
        return Recipe(**recipe), None
