"""From a recipe to cases with stored features and rewards that can score them: all checks come before training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from envs.case import Case
from envs.registry import make_env
from models.visual import FeatureBank
from rewards.registry import RewardFunction, get_rewards, gold_completion
from rl.recipe import EncoderConfig, Run, checked
from rl.scoring import Scorer
from slides.encoder import load_encoder
from slides.errors import InputError
from slides.extraction import Outputs, extract_slides
from slides.fields import encode_fields
from slides.jobs import SlideJob
from slides.options import ExtractOptions
from slides.status import DONE


def load_cases(run: Run) -> dict[str, list[Case]]:
    """Cases of the recipe's environment by split; the first process makes generated ones, the others read them.

    Raises:
        InputError: a split is empty.
    """
    params = {k: v for k, v in run.cases.items() if k != "name"}
    with PartialState().main_process_first():
        cases = make_env(run.cases["name"], params)
    splits = {s: [c for c in cases if c.split == s] for s in ("train", "val", "test")}
    empty = [s for s, members in splits.items() if not members]
    if empty:
        raise InputError(
            f"cases: no case in split {' and '.join(empty)} ({len(cases)} cases in all); every run needs train, val "
            "(allocator, choices) and test (report): state the splits in the manifest or let the environment make them"
        )
    if run.balance:
        splits["train"] = balanced(splits["train"])
    return splits


def balanced(cases: Sequence[Case]) -> list[Case]:
    """Repeat the cases of rare answers, within each choice question, up to the number of the commonest answer."""
    groups: dict[str, dict[str, list[Case]]] = {}
    for case in cases:
        key = case.answer if case.task == "choice" else ""
        groups.setdefault(case.question, {}).setdefault(key, []).append(case)
    out = []
    for answers in groups.values():
        most = max(map(len, answers.values()))
        out += [members[i % len(members)] for members in answers.values() for i in range(most)]
    return out


def load_rewards(run: Run, cases: Sequence[Case]) -> list[RewardFunction]:
    """The recipe's rewards, checked: the gold answer of the first cases of every question must score 1."""
    rewards = get_rewards(run.rewards, base=run.base)
    scorer = Scorer(rewards, run.ladder[-1])
    by_question: dict[str, Case] = {}
    for case in cases:
        by_question.setdefault(case.question, case)
    probes = list(by_question.values())
    gold = [gold_completion({"answer": c.answer}) for c in probes]
    scores = scorer(gold, probes, [1] * len(probes), [1] * len(probes))
    problems = [
        f"case {c.id}: its gold answer {c.answer!r} scores {s:.3f} under `rewards`, not 1; "
        f"mend the answer or the reward"
        for c, s in zip(probes, scores, strict=True)
        if abs(s - 1) > 1e-6
    ]
    if problems:
        raise InputError(problems)
    return rewards


def load_features(cases: Sequence[Case], encoder: EncoderConfig, folder: Path) -> FeatureBank:
    """Encode what is not stored yet and return the bank of all images and slides of the cases."""
    fields = list(dict.fromkeys(p for c in cases for p in c.images))
    slides = list(dict.fromkeys(p for c in cases for p in c.slides))
    files = {p: p for p in slides if p.endswith(".h5")}
    whole = [p for p in slides if p not in files]
    with PartialState().main_process_first():
        if fields:
            model = load_encoder(encoder.name, revision=encoder.revision, trust_remote_code=encoder.trust_remote_code)
            files.update(encode_fields(fields, folder / "fields", model, encoder.field_side))
    if whole:
        files.update(_extract(whole, encoder, folder / "slides"))
    return FeatureBank(files)


def _extract(slides: list[str], encoder: EncoderConfig, out: Path) -> dict[str, str]:
    """Feature file of each slide; the slides are shared out over the processes.

    Raises:
        InputError: all slides that gave no features, each with its reason.
    """
    state = PartialState()
    options = checked(
        ExtractOptions,
        {
            "mpp": encoder.mpp,
            "tile_px": encoder.tile_px,
            "cells": encoder.cells,
            "encoder": encoder.name,
            "encoder_revision": encoder.revision,
            "trust_remote_code": encoder.trust_remote_code,
            "dtype": "float16",
            **encoder.slide,
        },
        "encoder.slide",
    )
    # Names alone may repeat in different folders.
    names = {s: f"{Path(s).stem}-{hashlib.sha256(s.encode()).hexdigest()[:8]}" for s in slides}
    jobs = [SlideJob(Path(s), id=names[s]) for s in slides]
    statuses = extract_slides(jobs, out, options, rank=state.process_index, world=state.num_processes)
    failed = [
        f"{s.file}: {s.reason}; mend or replace the slide, or drop its cases" for s in statuses if s.status != DONE
    ]
    failed = gather_object(failed) if state.num_processes > 1 else failed
    if failed:
        raise InputError(failed)
    return {s: str(Outputs(out).features(names[s])) for s in slides}
