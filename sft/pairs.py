"""Pairs of slides and texts, from a manifest or from the cases of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError
from frugalpath.models.retrieval import Item, RetrievalIndex, slide_rows
from frugalpath.recipe.data import load_cases
from frugalpath.recipe.features import load_features
from frugalpath.recipe.run import parse_recipe
from frugalpath.slides.field_store import StoredField, load_stored


class FeatureFiles(Sequence):
    """Lazily read rows (n, d + 4) of slides; the files of a pair are concatenated.

    Args:
        files: feature files, or places in a store of fields, of each pair.
    """

    def __init__(self, files: Sequence[Sequence[str | StoredField]]):
        self.files = files
        self.encoder: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: Any) -> torch.Tensor:
        return torch.cat([self._read(file) for file in self.files[at]])

    def _read(self, file: str | StoredField) -> torch.Tensor:
        stored = load_stored(file)
        if not len(stored):
            raise InputError(f"{file}: no patches; leave the slide out, or check its tissue mask")
        encoder = stored.attrs.get("encoder_fingerprint") or stored.attrs.get("encoder")
        if encoder and self.encoder and encoder != self.encoder:
            raise InputError(
                f"{file}: features of the encoder {encoder}, others are of {self.encoder}; extract all slides with one"
            )
        self.encoder = encoder or self.encoder
        return slide_rows(stored)


def from_manifest(path: Path) -> tuple[list[Item], FeatureFiles]:
    """Read slides and feature files from a manifest (CSV, TSV, JSON lines, JSON or parquet).

    A row has `slide`, a feature file relative to the manifest (`frugalpath extract` writes them); `text`, its
    report, which may be empty; `patient`, by default the row's id; `id`, by default the file's stem.

    Raises:
        InputError: lists all invalid rows with their positions.
    """
    rows, problems = read_rows(path)
    items, files = [], []
    for row in rows:
        named = str(row.values.get("slide") or "").strip()
        file = path.parent / named
        if not named:
            problems.append(f"{row.at}: no `slide`; name its feature file")
        elif file.suffix != ".h5":
            problems.append(f"{row.at}: {named} is not a feature file (.h5); write it with `frugalpath extract`")
        elif not file.is_file():
            problems.append(f"{row.at}: no such file {file}")
        name = str(row.values.get("id") or file.stem)
        text = str(row.values.get("text") or "").strip()
        items.append(Item(name, str(row.values.get("patient") or name), text or None))
        files.append([str(file)])
    if problems:
        raise InputError(problems)
    return items, FeatureFiles(files)


def from_recipe(config: str, split: str, question: str | None) -> tuple[list[Item], FeatureFiles]:
    """Collect slides and feature files of a recipe's cases with text answers; missing features are extracted.

    Raises:
        InputError: there is no such case.
    """
    run = parse_recipe(["--config", config])
    cases = load_cases(run)[split]
    told = [c for c in cases if c.task in ("open", "synoptic") and question in (None, c.question)]
    if not told:
        asked = sorted({c.question for c in cases})
        raise InputError(f"{config}: no {split} case with a text as its answer; its questions are {', '.join(asked)}")
    bank = load_features(told, run.encoder, Path(run.encoder.folder or run.folder / "features"))
    items = [Item(c.id, c.patient, c.answer) for c in told]
    shown = [[s for s in (*c.images, *c.slides) if s not in bank.missing] for c in told]
    return items, FeatureFiles([[bank.files[s] for s in sources] for sources in shown])


def recipe_labels(config: str, question: str, index: RetrievalIndex) -> dict[int, str]:
    """Labels of an index's slides, by number: the answers to a question about the same slides.

    Raises:
        InputError: the index was not built from this recipe, or the question is asked of none of its slides.
    """
    splits = load_cases(parse_recipe(["--config", config]))
    cases = [c for members in splits.values() for c in members]
    shown = {c.id: (c.images, c.slides) for c in cases}
    answers = {shown[c.id]: c.answer for c in cases if c.question == question}
    found = {i: shown[item.id] for i, item in enumerate(index.items) if item.id in shown}
    labels = {i: answers[slides] for i, slides in found.items() if slides in answers}
    if not labels:
        raise InputError(
            f"{config}: none of the index' {len(index.items)} slides has an answer to {question!r}; build the index "
            f"of this recipe, and ask one of {', '.join(sorted({c.question for c in cases}))}"
        )
    return labels
