"""FrugalPath: reinforcement learning for pathology vision-language models that spend few visual tokens.

    from frugalpath import Allocator, load_cases

    allocator = Allocator.from_pretrained("runs/demo")
    for case in load_cases("new.jsonl"):
        print(allocator.answer(case, price=0.1).text)

These names are what programs use; each is imported when it is first asked for.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugalpath.deploy.library import Allocator, Performer
    from frugalpath.envs.case import Case
    from frugalpath.envs.registry import load_cases
    from frugalpath.errors import InputError
    from frugalpath.recipe.run import parse_recipe
    from frugalpath.rewards.calling import reward
    from frugalpath.rewards.synoptic.reward import score_report
    from frugalpath.rl.trainer import GroupTrainer
    from frugalpath.slides.extraction import extract_slides

__all__ = [
    "Allocator",
    "Case",
    "GroupTrainer",
    "InputError",
    "Performer",
    "extract_slides",
    "load_cases",
    "parse_recipe",
    "reward",
    "score_report",
]

_PLACES = {
    "Allocator": "deploy.library",
    "Case": "envs.case",
    "GroupTrainer": "rl.trainer",
    "InputError": "errors",
    "Performer": "deploy.library",
    "extract_slides": "slides.extraction",
    "load_cases": "envs.registry",
    "parse_recipe": "recipe.run",
    "reward": "rewards.calling",
    "score_report": "rewards.synoptic.reward",
}

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "pyproject.toml").is_file():  # not installed from a wheel: the packages stand beside this folder
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
