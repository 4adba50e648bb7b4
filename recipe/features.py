"""Stored features of a recipe's images and slides: what is not stored yet is encoded where the run computes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from tqdm import tqdm

from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.models.feature_bank import FeatureBank
from frugalpath.recipe.run import EncoderConfig
from frugalpath.slides.encoder import load_encoder
from frugalpath.slides.extraction import Outputs, extract_slides
from frugalpath.slides.field_store import StoredField, load_stored
from frugalpath.slides.fields import encode_fields
from frugalpath.slides.jobs import SlideJob
from frugalpath.slides.options import ExtractOptions
from frugalpath.slides.status import DONE
from frugalpath.slides.trial import try_features
from frugalpath.values import checked

logger = logging.getLogger(__name__)

NAMED = 20
"""Missing slides that one warning names; the report has them all."""


def load_features(cases: Sequence[Case], encoder: EncoderConfig, folder: Path) -> FeatureBank:
    """Encode what is not stored yet and return the bank of all images and slides of the cases.

    A slide that gives no features is left out, with one warning, and named in the bank's `missing`.

    Raises:
        InputError: cases that have nothing left to show; with `encoder.strict` every slide that gives no features.
    """
    fields = list(dict.fromkeys(p for c in cases for p in c.images))
    slides = list(dict.fromkeys(p for c in cases for p in c.slides))
    stored = [p for p in slides if p.endswith(".h5")]
    whole = [p for p in slides if not p.endswith(".h5")]
    files: dict[str, str | StoredField] = {}
    missing: dict[str, str] = {}
    if fields:
        files.update(_encode(fields, encoder, folder / "fields"))
    if whole:
        missing = _extract(whole, encoder, folder / "slides")
        files.update({p: str(_features(p, folder / "slides")) for p in whole if p not in missing})
    width = load_stored(next(iter(files.values()))).features.shape[1] if files else None
    missing |= _unusable(stored, width)
    files.update({p: p for p in stored if p not in missing})
    _check_missing(cases, missing, encoder.strict)
    return FeatureBank(files, missing=missing)


def cases_of(cases: Sequence[Case], missing: Collection[str]) -> dict[str, int]:
    """How many cases each missing slide belongs to; a case that is repeated counts once."""
    found = {(c.id, p) for c in cases for p in c.slides if p in missing}
    return dict(Counter(p for _, p in sorted(found)))


def _check_missing(cases: Sequence[Case], missing: Mapping[str, str], strict: bool) -> None:
    """Warn of missing slides once, or raise InputError where that is not enough."""
    if strict and missing:
        raise InputError(f"{p}: {why}; mend or replace the slide, or drop its cases" for p, why in missing.items())
    bare = {c.id: c for c in cases if all(p in missing for p in (*c.images, *c.slides))}
    if bare:
        raise InputError(
            f"case {c.id}: nothing is left to show: {'; '.join(f'{p}: {missing[p]}' for p in c.slides)}; mend or "
            "replace a slide, or drop the case"
            for c in bare.values()
        )
    if missing and PartialState().is_main_process:
        touched = len({c.id for c in cases if any(p in missing for p in c.slides)})
        named = "; ".join(f"{p}: {why}" for p, why in list(missing.items())[:NAMED])
        more = f"; and {len(missing) - NAMED} more, see missing_slides in the report" if len(missing) > NAMED else ""
        logger.warning(
            "%d slides give no features; %d cases go on with what else they show: %s%s",
            *(len(missing), touched, named, more),
        )


def _unusable(stored: Sequence[str], width: int | None) -> dict[str, str]:
    """Which of the user's feature files cannot be used, and why; all are read, so that none fails during training.

    Args:
        width: of the features of other sources; None takes the commonest of these files.
    """
    missing, widths = {}, {}
    found = try_features(stored) if stored else iter(())
    progress = tqdm(found, desc="check features", total=len(stored), disable=len(stored) < 50, leave=False)
    for path, result in zip(stored, progress, strict=True):
        if isinstance(result, str):
            missing[path] = result
        elif not result[0]:
            missing[path] = "it holds no patch"
        elif not result[2]:
            missing[path] = "it states no patch size, and its coordinates do not tell"
        else:
            widths[path] = result[1]
    ranked = Counter(widths.values()).most_common(2)
    if width is None and len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        first, other = (next(p for p, w in widths.items() if w == wide) for wide, _ in ranked)
        raise InputError(
            f"{first} and {other}: as many feature files are {ranked[0][0]} wide as {ranked[1][0]}; take those of one "
            "encoder"
        )
    usual = width or (ranked[0][0] if ranked else 0)
    return missing | {
        p: f"its features are {w} wide, those of the others {usual}" for p, w in widths.items() if w != usual
    }


def _encode(fields: list[str], encoder: EncoderConfig, out: Path) -> dict[str, str | StoredField]:
    """Encode the fields of view where the run computes, shared out over the processes."""
    state = PartialState()
    model = load_encoder(
        encoder.name,
        revision=encoder.revision,
        trust_remote_code=encoder.trust_remote_code,
        device=_device(encoder),
        precision=encoder.precision,
    )
    several = state.num_processes > 1
    files = encode_fields(
        fields,
        out,
        model,
        encoder.field_side,
        rank=state.process_index,
        world=state.num_processes,
        gather=gather_object if several else None,
        progress=state.is_main_process,
    )
    release_memory(model)  # the performer needs the GPU next
    return files


def _device(encoder: EncoderConfig) -> str:
    return str(PartialState().device) if encoder.device == "auto" else encoder.device


def _extract(slides: list[str], encoder: EncoderConfig, out: Path) -> dict[str, str]:
    """Extract the slides, shared out over the processes; those that give no features, and why."""
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
            "precision": encoder.precision,
            "dtype": "float16",
            **encoder.slide,
        },
        "encoder.slide",
    )
    jobs = {_key(s): SlideJob(Path(s), id=_key(s)) for s in slides}
    place = {"rank": state.process_index, "world": state.num_processes}
    statuses = extract_slides(jobs.values(), out, options, device=_device(encoder), **place)
    failed = [(s.id, s.reason) for s in statuses if s.status != DONE]
    reasons = dict(gather_object(failed) if state.num_processes > 1 else failed)
    return {s: reasons[_key(s)] for s in slides if _key(s) in reasons}


def _key(slide: str) -> str:
    """Name of a slide's outputs; file names alone may repeat in different folders."""
    return f"{Path(slide).stem}-{hashlib.sha256(slide.encode()).hexdigest()[:8]}"


def _features(slide: str, out: Path) -> Path:
    return Outputs(out).features(_key(slide))
