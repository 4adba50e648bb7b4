"""Per-field results of synoptic reports, stage by stage, at the budget that each stage's validation table prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from envs.case import Case
from rewards.bootstrap import Bootstrap
from rewards.synoptic.corpus import corpus_report, table_text
from rewards.synoptic.protocol import load_protocol
from rewards.synoptic.reward import score_completions


def field_results(
    cases: Sequence[Case], completions: Mapping[str, Sequence[str]], resamples: int, seed: int
) -> dict[str, Any]:
    """Corpus reports of every stage by protocol, and what each stage gains over the first.

    Args:
        cases: test cases; those of other tasks than `synoptic` are left out.
        completions: stage -> completions of all cases.
        resamples, seed: of the bootstrap, by patient.

    Returns:
        protocol -> {stage -> `corpus_report`, with `gain` `{value, ci95}`: the mean over cases of the difference in
        non-null accuracy to the first stage, paired}. Empty without synoptic cases.
    """
    results: dict[str, Any] = {}
    for name in sorted({str(c.protocol) for c in cases if c.task == "synoptic"}):
        rows = [i for i, c in enumerate(cases) if c.task == "synoptic" and c.protocol == name]
        answers, protocols = [cases[i].answer for i in rows], [name] * len(rows)
        first: np.ndarray | None = None
        for stage, texts in completions.items():
            found = score_completions([texts[i] for i in rows], answers, protocols)
            kept = [(i, score) for i, score in zip(rows, found, strict=True) if score is not None]
            patients = [cases[i].patient for i, _ in kept]
            report = corpus_report([score for _, score in kept], load_protocol(name), patients, resamples, seed)
            accuracy = np.array([score.non_null_accuracy for _, score in kept], dtype=float)
            if first is None:
                first = accuracy
            else:
                report["gain"] = Bootstrap(patients, resamples, seed).difference(accuracy - first)
            results.setdefault(name, {})[stage] = report
    return results


def print_fields(results: Mapping[str, Any]) -> None:
    """The tables of all stages on standard output."""
    for protocol, stages in results.items():
        for stage, report in stages.items():
            print(f"\nfields of {protocol}, {stage}\n{table_text(report)}")
            if "gain" in report:
                low, high = report["gain"]["ci95"]
                print(
                    f"non-null accuracy over the first stage: {report['gain']['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
                )
