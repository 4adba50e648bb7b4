"""The `allocator.text` part of a recipe: the form that writes a budget.

A recipe: one YAML file (and its command line) as checked dataclasses; an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from trl import SFTConfig

from frugalpath.errors import InputError, removed
from frugalpath.models.build import PerformerConfig
from frugalpath.parsing import parse_yaml
from frugalpath.recipe.file import (
    FORMER,
    FORMER_FORMS,
    Recipe,
    config_of,
    content_of,
    parsed,
    with_present_names,
    without_removed,
)
from frugalpath.recipe.grpo import FrugalConfig
from frugalpath.recipe.sft import OWN, Stage, read_stages
from frugalpath.rewards.cost import INSTEAD, OBJECTIVES, OF_GROUPS, REMOVED
from frugalpath.values import checked, collect_errors, plain_types, typed

PRESETS = ("birr", "linear")
"""Presets that need to know of no other budget of the case."""


@dataclass
class TextOptions:
    """How the adapter that writes a budget looks and learns.

    Args:
        look: tokens that it is shown; null is the published cap of 256, or the largest budget where that is less.
        preset: what a budget is worth, see `frugalpath.rewards.cost`; `linear` is at `allocator.price`.
        format_weight: of the reward for the form of the completion.
        lora: keys of peft's `LoraConfig`.
        warm_start: keys of `SFTConfig`; budgets drawn uniformly from the ladder are taught first. Null teaches none.
        grpo: GRPO arguments that differ from the recipe's own.
    """

    look: int | None = None
    preset: str = "birr"
    format_weight: float = 1.0
    lora: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, Any] | None = None
    grpo: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What is wrong with it, one line each."""
        found = []
        if self.preset in REMOVED:
            found.append(removed(f"allocator.text.preset: {self.preset}", f"{INSTEAD} linear; write linear or birr"))
        elif self.preset not in PRESETS:
            found.append(f"allocator.text.preset: {self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        if self.look is not None and self.look < 1:
            found.append(f"allocator.text.look: {self.look} tokens; it is shown at least 1")
        return found


SYSTEM = (
    "A conversation between User and Assistant. The assistant first thinks about the reasoning process and then gives "
    "the answer: <think> reasoning process here </think><answer> answer here </answer>."
)
TURN = (
    "Allocate the optimal token number for the image based on the pathology task. Generally, simple images and tasks "
    "receive fewer tokens and complex ones receive more tokens. The current input token number is {current_token} and "
    "a maximum limit is {max_token}. The pathology task is: {pathology_prompt}. The answer should be a positive "
    "integer of the image token number."
)
"""The published turn of the user (methods 1.6)."""
BUDGET_TEXTS = (SYSTEM, TURN)

FORMS = ("value", "policy", "text", "cascade")
"""Forms of the allocator; `frugalpath.rl.allocate.fit_allocator` has a branch for each."""
ADVANTAGES = ("rloo", "grpo")
"""Values of `allocator.advantage`."""
OPERATING = ("one_error", "within")
"""Rules of `evaluation.operating`."""


@dataclass
class EncoderConfig:
    """The `encoder` part: how images and slides become stored features.

    Args:
        name: see `frugalpath.slides.encoder.load_encoder`. revision, trust_remote_code: for a model of a hub.
        device: where it runs: `auto` is where the run computes, one GPU a process where there are some.
        precision: `float32`, or `bfloat16` or `float16` for speed on a GPU; other features, stored as such.
        field_side: px of the longer side at which a field of view is encoded; null keeps its size.
        mpp, tile_px, cells: tiling of slides, see `frugalpath.slides.extract`.
        slide: further options of `frugalpath.slides.extract.ExtractOptions`.
        folder: where features are kept; null puts them into the run's folder.
        strict: a slide without features is an error, also where its cases have others.
    """

    name: str = "efficientnet-lite0"
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    precision: str = "float32"
    field_side: int | None = None
    mpp: float = 2.0
    tile_px: int = 224
    cells: int = 7
    slide: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    strict: bool = False

    def identity(self) -> dict[str, Any]:
        """What features depend on; keys at the values that they had before they could be set are left out."""
        values = dataclasses.asdict(self)
        del values["device"]
        if self.precision == "float32":
            del values["precision"]
        return values


@dataclass
class AllocatorOptions:
    """The `allocator` part.

    Args:
        form: `value` predicts the score of every budget, `policy` is a policy given the price, `text` writes a budget,
            `cascade` looks at one budget after another until the performer is sure enough; see docs/training.md.
        objective: what it maximises, a preset of `frugalpath.rewards.cost`.
        target: mean cost that the objective `dual` aims at, the largest budget = 1.
        look: budgets whose pooled tokens are the cheapest look.
        width, dropout: of the value head.
        price: lambda while exploring in the joint step.
        temperature, explore: spread of drawn budgets around the best, and share of uniform draws.
        learning_rate: of the online updates.
        fit_learning_rate: and weight_decay: of the fit on a score table.
        fit_epochs: at most so many; the number is chosen by the loss on held-out patients.
        price_range: lowest and highest lambda that a policy is trained for; it is drawn between them.
        entropy: of a policy, reward for a nat of entropy; entropy_decay: its factor for each epoch.
        advantage: of a policy in the joint step, `rloo` or `grpo`; see `frugalpath.allocator.online`.
        text: of the form that writes a budget, keys of `TextOptions`.
    """

    form: str = "value"
    objective: str = "linear"
    target: float | None = None
    look: list[int] = field(default_factory=lambda: [1, 4])
    width: int = 64
    dropout: float = 0.3
    price: float = 0.1
    temperature: float = 0.03
    explore: float = 0.3
    learning_rate: float = 2e-3
    fit_learning_rate: float = 3e-4
    fit_epochs: int = 40
    weight_decay: float = 1e-2
    price_range: list[float] = field(default_factory=lambda: [0.003, 1.0])
    entropy: float = 0.03
    entropy_decay: float = 1.0
    advantage: str = "rloo"
    text: TextOptions = field(default_factory=TextOptions)

    def settings(self) -> dict[str, Any]:
        """What a trained allocator depends on.

        Keys that are as they were before they existed are left out, removed ones are in it as they were by default,
        and a form has the name that it had first.
        """
        own = {k: v for k, v in dataclasses.asdict(self).items() if k != "text"}
        own["form"] = next((old for old, new in FORMER_FORMS.items() if new == self.form), self.form)
        if self.form != "policy":
            own = {k: v for k, v in own.items() if k not in ("price_range", "entropy", "entropy_decay", "advantage")}
        usual = {"form": "value", "objective": "linear", "target": None}
        return {k: v for k, v in own.items() if k not in usual or v != usual[k]} | FORMER

    def problems(self) -> list[str]:
        """What is wrong with it, one line each."""
        known = {"form": FORMS, "objective": OBJECTIVES, "advantage": ADVANTAGES}
        found = [
            f"allocator.{key}: {getattr(self, key)!r} is unknown; use one of {', '.join(names)}"
            for key, names in known.items()
            if getattr(self, key) not in names and (key != "objective" or self.objective not in REMOVED)
        ]
        if self.objective in REMOVED:
            found.append(removed(f"allocator.objective: {self.objective}", f"{INSTEAD} linear; write linear"))
        if self.form == "value" and self.objective in OF_GROUPS:
            found.append(
                f"allocator.objective: {self.objective} compares the budgets of a case, which a predicted mean score "
                "does not tell; set allocator.form to policy"
            )
        if (self.objective == "dual") != (self.target is not None):
            found.append(
                "allocator.target: the mean cost (largest budget = 1) belongs to the objective dual; set both"
            )
        if self.target is not None and not 0 < self.target <= 1:
            found.append(f"allocator.target: {self.target} is no share of the largest budget; give one in 0..1")
        prices = self.price_range
        if len(prices) != 2 or not 0 < prices[0] <= prices[1]:
            found.append(f"allocator.price_range: {prices} is no [lowest, highest] with a lowest above 0")
        if self.form == "policy" and self.explore == 0 and self.entropy == 0:
            found.append("allocator.explore: with 0, and entropy 0, a policy settles on one budget; raise one of them")
        return [*found, *self.text.problems()]


@dataclass
class EvaluationOptions:
    """The `evaluation` part.

    Args:
        prices: lambdas of the allocator's curve.
        operating: rule that chooses the operating price on validation cases, see `frugalpath.evaluation.run`.
        tolerance: accuracy that this rule may give up.
        price: the operating price itself, in place of a rule.
        max_new_tokens: null takes `max_completion_length`.
        bootstrap: resamples of the intervals; by patient.
        batch_size: rows of one generation batch.
        sft_continued: also train SFT on for the compute that GRPO took, as a control.
        linear_probe: also fit a logistic regression on the same frozen features (choice cases).
    """

    prices: list[float] = field(
        default_factory=lambda: [0.0, 0.003, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.27, 0.4, 0.6, 1.0]
    )
    operating: str = "one_error"
    tolerance: float = 0.005
    price: float | None = None
    max_new_tokens: int | None = None
    bootstrap: int = 2000
    batch_size: int = 128
    sft_continued: bool = True
    linear_probe: bool = True


@dataclass
class Run:
    """A parsed recipe."""

    cases: dict[str, Any]
    encoder: EncoderConfig
    performer: PerformerConfig
    ladder: list[int]
    sft: list[Stage]
    questions: list[str] | None
    balance: bool
    rewards: list[Any]
    allocator: AllocatorOptions
    evaluation: EvaluationOptions
    grpo: FrugalConfig
    path: Path | None

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.grpo.output_dir)

    @property
    def feature_folder(self) -> Path:
        """Where features are kept."""
        return Path(self.encoder.folder) if self.encoder.folder else self.folder / "features"

    @property
    def base(self) -> Path:
        """Folder that file names in the recipe are relative to when the working folder has no such file."""
        return self.path.parent if self.path else Path.cwd()


def parse_recipe(argv: list[str] | None = None) -> Run:
    """Read `--config recipe.yaml` and the command line.

    Raises:
        InputError: no recipe, not a mapping, unknown keys (with the nearest known one) and bad values, told together.
    """
    # Told here, before anything else asks for it: without an accelerator several processes talk through gloo.
    PartialState(cpu=not torch.accelerator.is_available())
    problems: list[str] = []
    path, rest = config_of(list(sys.argv[1:] if argv is None else argv))
    content = content_of(path, problems)
    recipe, grpo = parsed(content, rest, path, problems)
    nested = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe) if f.name != "set"}
    for item in recipe.set:
        with collect_errors(problems):
            _override(nested, item)
    ladder = nested["ladder"]
    whole = isinstance(ladder, list) and all(isinstance(b, int) and not isinstance(b, bool) for b in ladder)
    if not whole or not ladder or sorted(set(ladder)) != ladder or ladder[0] < 1:
        problems.append(f"ladder: {ladder} must be ascending token counts, each a whole number of at least 1")
    if not isinstance(nested["cases"], dict) or "name" not in nested["cases"]:
        problems.append(
            "cases: `name` is missing; name an environment: manifest, mosaic, simulator or module:function"
        )
    with collect_errors(problems):
        performer = checked(PerformerConfig, nested["performer"], "performer")
    with collect_errors(problems):
        encoder = checked(EncoderConfig, nested["encoder"], "encoder")
    with collect_errors(problems):
        given = isinstance(nested["performer"], dict) and nested["performer"].get("checkpoint")
        # A checkpoint is taken as it is unless the recipe says how it is to be trained.
        sft = _stages(nested["sft"] or ([] if given else {}))
    with collect_errors(problems):
        allocator = checked(
            AllocatorOptions, without_removed(with_present_names(nested["allocator"]), problems), "allocator"
        )
        problems += allocator.problems()
    with collect_errors(problems):
        evaluation = checked(EvaluationOptions, nested["evaluation"], "evaluation")
        if evaluation.operating not in OPERATING:
            problems.append(
                f"evaluation.operating: {evaluation.operating!r} is unknown; use one of {', '.join(OPERATING)}"
            )
    if problems or grpo is None:
        raise InputError(problems)
    run = Run(
        cases=nested["cases"],
        encoder=encoder,
        performer=performer,
        ladder=ladder,
        sft=sft,
        questions=nested["questions"],
        balance=recipe.balance,
        rewards=nested["rewards"],
        allocator=allocator,
        evaluation=evaluation,
        grpo=grpo,
        path=path,
    )
    if grpo.use_vllm and performer.checkpoint is None and performer.family != "qwen_vl":
        problems.append(
            f"use_vllm: vLLM serves performer.family qwen_vl alone, not {performer.family} (slide_vlm is no stock "
            "model, gemma_vl pools its tokens); set use_vllm to false"
        )
    if not set(run.allocator.look) <= set(ladder):
        problems.append(f"allocator.look: {run.allocator.look} must be budgets of the ladder {ladder}")
    if problems:
        raise InputError(problems)
    return run


def _stages(spec: Any) -> list[Stage]:
    """The stages of `sft`, with the numbers that their trainers take."""
    stages: list[Stage] = []
    problems: list[str] = []
    for stage in read_stages(spec):
        where = f"sft.{stage.kind}." if isinstance(spec, list) else "sft."
        with collect_errors(problems):
            types = plain_types(TrainingArguments if stage.no_language_model else SFTConfig) | OWN
            taken = typed(stage.options, types, where)
            stages.append(dataclasses.replace(stage, options=taken))
    if problems:
        raise InputError(problems)
    return stages


def _override(nested: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    *path, last = key.split(".")
    if not equals or not path or path[0] not in nested:
        raise InputError(f"--set {item}: write section.key=value with a section among {', '.join(nested)}")
    place: Any = nested
    for name in path:
        place = _stage(place, name, item) if isinstance(place, list) else place.setdefault(name, {})
        if not isinstance(place, dict | list):
            raise InputError(f"--set {item}: {name} is {place!r}, which has no keys")
    if isinstance(place, list):
        raise InputError(
            f"--set {item}: {path[-1]} is a list; name an entry of it before the key, as in sft.case.{last}"
        )
    place[last] = parse_yaml(value, f"--set {item}")


def _stage(stages: list[Any], name: str, item: str) -> Any:
    """The entry of a list of stages that is called `name`."""
    called = [s.get("stage", "warm_start") for s in stages if isinstance(s, dict)]
    if name not in called:
        raise InputError(f"--set {item}: the recipe has no stage {name!r}; it has {', '.join(called) or 'none'}")
    return next(s for s in stages if isinstance(s, dict) and s.get("stage", "warm_start") == name)
