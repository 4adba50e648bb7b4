"""Environments by name: sources of a recipe's cases."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.user_code import load_user_module

# Imported when asked for, so that a recipe pays only for the environment it names.
BUILT_IN = {
    "manifest": "frugalpath.envs.manifest:build",
    "mosaic": "frugalpath.envs.mosaic:build",
    "simulator": "frugalpath.envs.simulator:build",
}


def make_env(name: str, params: Mapping[str, Any] | None = None, base: str | Path | None = None) -> list[Case]:
    """Make the cases of an environment.

    Args:
        name: `manifest`, `mosaic`, `simulator`, or a function of the user's own as `module:function` or
            `path.py:function`; it takes keyword-only parameters and returns a list of `Case`.
        params: its parameters, as written in the recipe.
        base: folder that a `path.py` is relative to; the current folder is tried after it.

    Raises:
        InputError: the name is unknown, or a parameter is unknown, missing, or the function returns anything else.
    """
    build = find_env(name, base)
    params = dict(params or {})
    signature = inspect.signature(build)
    accepted = {
        p.name: p for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    problems = []
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in params:
            if key not in accepted:
                close = difflib.get_close_matches(str(key), accepted, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(accepted)}"
                problems.append(f"environment {name!r} has no parameter {key!r}; {hint}")
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and key not in params:
            problems.append(f"environment {name!r} needs the parameter {key!r}")
    if problems:
        raise InputError(problems)
    cases = build(**params)
    if not isinstance(cases, list) or not all(isinstance(case, Case) for case in cases):
        raise InputError(
            f"environment {name!r} must return a list of frugalpath.envs.case.Case, not {type(cases).__name__}"
        )
    return cases


def load_cases(source: str | Path, **params: Any) -> list[Case]:
    """Cases of a manifest, checked, or of an environment.

    Args:
        source: a manifest, see docs/data.md, as a path; or the name of an environment, as for `make_env`. A manifest
            that is called like one is given as a `Path`.
        params: of `frugalpath.envs.manifest.build`, or of the environment.

    Raises:
        InputError: bad rows and parameters, all of them.
    """
    if isinstance(source, str) and (source in BUILT_IN or re.search(r":\w+$", source)):
        return make_env(source, params)
    return make_env("manifest", {"path": str(source), **params})


def find_env(name: str, base: str | Path | None = None) -> Callable[..., list[Case]]:
    """The `build` function behind a name; see `make_env`."""
    target = BUILT_IN.get(name, name)
    module_name, separator, function = target.rpartition(":")
    if not separator:
        raise InputError(
            f"unknown environment {name!r}; use {', '.join(BUILT_IN)}, 'module:function' or 'path.py:function'"
        )
    module = load_user_module(module_name, f"environment {name!r}", base)
    build = getattr(module, function, None)
    if not callable(build):
        raise InputError(f"environment {name!r}: {module_name} has no function {function!r}")
    return build
