"""Scores of many synoptic reports: per-field table, macro and micro means, agreement, critical errors, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import cohen_kappa_score

from frugalpath.bootstrap import Bootstrap
from frugalpath.rewards.synoptic.protocol import Field, Protocol
from frugalpath.rewards.synoptic.score import CaseScore, deviation


def corpus_report(
    scores: Sequence[CaseScore],
    protocol: Protocol,
    patients: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Summary of N scored cases.

    Args:
        scores: of N cases. patients: of the same cases; they are resampled together.
        protocol: of the cases.
        resamples, seed: of the bootstrap.

    Returns:
        `n`; means with 95 % intervals `{value, ci95}`: `case_score`, `non_null_accuracy` (micro: over all answered
        gold cells), `macro_accuracy` (over fields), `all_cells_accuracy` (null against null counted as right),
        `coverage`, `completeness`, `critical_right`, `critical_error_free`, `hallucinated` (fields a case); and
        `fields`: id -> `{n, accuracy, ci95, credit, coverage}` with `mae` for numbers, `kappa` for coded values
        (`weighting` quadratic for ordinal ones), `inferable`. What no case has is left out.
    """
    bootstrap = Bootstrap(patients, resamples, seed)
    # The micro mean weighs every cell alike: a ratio of sums, resampled as such.
    right = np.array([sum(c.right for c in s.top) for s in scores], dtype=float)
    attempted = np.array([sum(c.attempted for c in s.top) for s in scores], dtype=float)
    cells = np.array([s.scored for s in scores], dtype=float)
    nulls = np.array([len(protocol.fields) - s.scored for s in scores], dtype=float)
    null_right = np.array([s.null_right for s in scores], dtype=float)
    summary: dict[str, Any] = {
        "n": len(scores),
        "case_score": _mean(bootstrap, [s.case_score for s in scores]),
        "non_null_accuracy": bootstrap.ratio(right, cells) if cells.any() else None,
        "all_cells_accuracy": bootstrap.ratio(right + null_right, cells + nulls),
        "coverage": bootstrap.ratio(attempted, cells) if cells.any() else None,
        "completeness": _mean(bootstrap, [s.complete for s in scores]),
        "critical_right": _mean(bootstrap, [s.critical_right for s in scores]),
        "critical_error_free": _mean(bootstrap, [not s.critical_errors for s in scores]),
        "hallucinated": _mean(bootstrap, [len(s.hallucinated) for s in scores]),
    }
    names = [(f.id, f) for f in protocol.fields]
    names += [(f"{f.id}.{i.id}", i) for f in protocol.fields for i in f.fields]
    summary["fields"] = {name: row for name, field in names if (row := _field_row(name, field, scores, bootstrap))}
    top = [row["accuracy"] for name, row in summary["fields"].items() if "." not in name]
    if top:
        summary["macro_accuracy"] = {
            "value": float(np.mean(top)),
            "ci95": _macro_interval(scores, protocol, bootstrap),
        }
    return {k: v for k, v in summary.items() if v is not None}


def _mean(bootstrap: Bootstrap, values: Sequence[Any]) -> dict[str, Any] | None:
    array = np.array([np.nan if v is None else float(v) for v in values])
    if np.isnan(array).all():
        return None
    return {"value": float(np.nanmean(array)), "ci95": list(bootstrap.interval(array))}


def _field_row(name: str, field: Field, scores: Sequence[CaseScore], bootstrap: Bootstrap) -> dict[str, Any] | None:
    found = [s.cells.get(name) for s in scores]
    cells = [c for c in found if c is not None]
    accuracy = _mean(bootstrap, [None if c is None else c.right for c in found])
    if accuracy is None:
        return None
    row: dict[str, Any] = {
        "n": len(cells),
        "accuracy": accuracy["value"],
        "ci95": accuracy["ci95"],
        "credit": float(np.mean([c.credit for c in cells])),
        "coverage": float(np.mean([c.attempted for c in cells])),
        "inferable": field.inferable,
    }
    pairs = [(c.gold, c.predicted) for c in cells]
    if "." in name:
        pairs = [pair for gold, predicted in pairs for pair in zip(gold, predicted, strict=True)]
    if field.type in ("number", "integer"):
        gaps = [gap for pair in pairs if (gap := deviation(*pair)) is not None]
        row |= {"mae": float(np.mean(gaps))} if gaps else {}
    elif field.type in ("categorical", "boolean", "ordinal"):
        row |= _agreement(field, pairs)
    return row


def _agreement(field: Field, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Cohen's kappa over the answered cells; ordinal values by rank with quadratic weights."""
    answered = [(g, p) for g, p in pairs if p is not None]
    ordinal = field.type == "ordinal"
    if ordinal:
        answered = [(field.rank[g], field.rank[p]) for g, p in answered if g in field.rank and p in field.rank]
    gold, predicted = [g for g, _ in answered], [p for _, p in answered]
    if len(set(gold) | set(predicted)) < 2:  # agreement beyond chance has no meaning where only one value occurs
        return {}
    # All ranks are labels: a grade that does not occur must not bring its neighbours nearer.
    labels = list(range(len(field.rank))) if ordinal else None
    kappa = cohen_kappa_score(gold, predicted, labels=labels, weights="quadratic" if ordinal else None)
    return {"kappa": float(kappa), "weighting": "quadratic" if ordinal else "none"}


def _macro_interval(scores: Sequence[CaseScore], protocol: Protocol, bootstrap: Bootstrap) -> list[float]:
    columns = [[None if (c := s.cells.get(f.id)) is None else c.right for s in scores] for f in protocol.fields]
    kept = [
        np.array([np.nan if v is None else float(v) for v in column])
        for column in columns
        if any(v is not None for v in column)
    ]
    means = np.nanmean(np.stack([bootstrap.means(column) for column in kept]), axis=0)
    low, high = np.nanquantile(means, [0.025, 0.975])
    return [float(low), float(high)]


def table_text(report: dict[str, Any]) -> str:
    """The per-field table of a report as text."""
    lines = [f"{'field':<32}{'n':>6}  {'accuracy':>8}  {'95 % interval':<16}{'coverage':>9}{'kappa':>8}"]
    for name, row in report["fields"].items():
        low, high = row["ci95"]
        kappa = f"{row['kappa']:.3f}" if "kappa" in row else ""
        lines.append(
            f"{name:<32}{row['n']:>6}  {row['accuracy']:>8.3f}  [{low:.3f}, {high:.3f}]"
            f"  {row['coverage']:>7.3f}{kappa:>8}"
        )
    for name in (
        "non_null_accuracy",
        "macro_accuracy",
        "case_score",
        "coverage",
        "completeness",
        "critical_right",
        "critical_error_free",
        "hallucinated",
    ):
        if name in report:
            low, high = report[name]["ci95"]
            lines.append(f"{name:<32}{report['n']:>6}  {report[name]['value']:>8.3f}  [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)
