"""The summary of a run for the terminal, and its tables for docs/gpu.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.plan import ROOT
from benchmarks.gpu_parts.running import ABSENT, SKIPPED

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a gpu.jsonl; half a line at its end, of a machine that was taken away, is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(lines: Sequence[Line]) -> str:
    """One row a part: how it ended, seconds, and its main figures."""
    rows = []
    for end in (line for line in lines if line["status"] != "measured"):
        own = [line for line in lines if line["part"] == end["part"] and line["status"] == "measured"]
        told = "; ".join(filter(None, map(headline, own))) or end.get("why") or ""
        if end.get("error"):
            told = "; ".join(filter(None, [told, end["error"].splitlines()[-1][:160]]))
        rows.append((end["part"], end["status"], f"{end['seconds']:.0f} s" if "seconds" in end else "", told))
    widths = [max(len(row[at]) for row in rows) for at in range(3)] if rows else [0, 0, 0]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]) for r in rows)


def headline(line: Line) -> str:
    """A measured line in a few words."""
    case = line.get("case")
    if case == "facts":
        return f"{line['device']}, torch {line['versions']['torch']}"
    if case == "rates":
        return f"{line['bfloat16_tflops']:.4g} TFLOP/s in bfloat16"
    if case == "equality" or "max_logp_diff" in line:
        name = "" if case == "equality" else f"{case}: "
        return f"{name}log-probabilities differ by {line['max_logp_diff']:.1e} at most, gradients by {_grad(line)}"
    if case == "steps":
        share = line["train_step_mfu_measured"]
        return (
            f"{line['step_seconds']:.3g} s a step (generation {line['generate_seconds']:.3g}, update "
            f"{line['train_step_seconds']:.3g}), {line['peak_gb']:.3g} GB, update {_percent(share)} MFU"
        )
    if "tiles_per_second" in line:
        return f"{case}: {line['tiles_per_second']:.4g} tiles/s, one by one {line['one_by_one_tiles_per_second']:.4g}"
    if "estimate_gb" in line:
        return f"{case}: {line['ratio']:.2f} of what was measured"
    if "ours_error" in line:
        return (
            f"bfloat16 gradients are off by {line['ours_error']:.3g}, TRL's by {line['stock_error']:.3g}, ratio "
            f"{line['ratio']} {line['ratio_interval']}"
        )
    if case == "file to report":
        return f"{line['run_seconds']:.0f} s, {line['steps']} steps, report written"
    if "sft_loss_rel_diff" in line:
        return f"supervised losses differ by {line['sft_loss_rel_diff']:.1e}"
    return str(line.get("tests") or "")


def write(folder: Path) -> None:
    """Put the tables of a run into docs/gpu.md.

    Raises:
        SystemExit: there is no run, it is a rehearsal, or it did not get as far as naming the machine.
    """
    path = folder / "gpu.jsonl"
    if not path.is_file():
        raise SystemExit(f"{path}: there is no such file; name the folder that a run wrote with --out")
    lines = read(path)
    if any(line["rehearsal"] for line in lines):
        raise SystemExit(f"{path}: a rehearsal on a CPU, whose figures say nothing")
    if not _cases(lines, "facts"):
        raise SystemExit(f"{path}: it does not say which machine it was; run it again")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE}: the marks {BEGIN} and {END} are missing")
    PAGE.write_text(f"{before}{BEGIN}\n{tables(lines)}\n{END}{after}")


def tables(lines: Sequence[Line]) -> str:
    """All tables, in Markdown."""
    (facts, *_) = _cases(lines, "facts")
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    about = [
        f"{facts['device']} ({facts.get('gpu_memory_gb')} GB), driver {facts.get('driver')}, CUDA "
        f"{facts.get('cuda')}; "
        f"{facts['cores']} cores of {facts['cpu']}. {versions}. Commit {facts['commit']}, {facts['date']}."
    ]
    for rates in _cases(lines, "rates"):
        about.append(
            f"Products of square matrices of {rates['size']}: {rates['bfloat16_tflops']:.0f} TFLOP/s in bfloat16 "
            f"(data sheet {facts.get('sheet_tflops')}), {rates['float32_tflops']:.0f} in float32 without TF32; copies "
            f"move {rates['copy_tb']:.2f} TB/s, read and written."
        )
    if not facts["tower_sees_once"]:
        about.append("This transformers takes no ready features: our trainer runs the tower in every pass too.")
    parts = [" ".join(about), _steps(lines), _exact(lines), _memory(lines), _encoders(lines), _rest(lines)]
    return "\n\n".join(part for part in parts if part)


def _steps(lines: Sequence[Line]) -> str:
    rows = []
    for line in _cases(lines, "steps"):
        name = {"ours": "ours", "stock": "TRL"}[line["trainer"]]
        name += ", FlexAttention" if line["attention"] == "flex_attention" else ""
        shares = " / ".join(_percent(line[f"train_step_mfu_{peak}"]) for peak in ("measured", "sheet"))
        whole = " / ".join(_percent(line[f"step_mfu_{peak}"]) for peak in ("measured", "sheet"))
        spans = [
            f"{line[f'{p}_seconds']:.3g} s ({_span(line[f'{p}_all'])})" for p in ("generate", "train_step", "step")
        ]
        tokens = f"{line['step_tokens_per_second']:.0f}"
        size = f"{line['shape']}, {line['image_tokens']}"
        rows.append([size, name, *spans, tokens, shares, whole, f"{line['peak_gb']:.1f}"])
    head = ["shape, image tokens", "trainer", "generation", "update", "step", "tokens/s of a step"]
    head += ["MFU of the update", "MFU of a step", "peak, GB"]
    text = _table(head, rows)
    if not text:
        return ""
    options = _cases(lines, "steps")[0]
    settings = options["options"]
    return (
        f"GRPO with LoRA on random weights: {settings['prompts']} prompts a step, G = {settings['group']}, "
        f"{settings['text_tokens']} text and {settings['completion_tokens']} completion tokens, {settings['dtype']}, "
        f"gradient checkpointing {'on' if settings['checkpointing'] else 'off'}; medians of n = {options['n']} steps "
        "(lowest to highest), images seen before. MFU is of the trainer's own FLOPs by formula, without repeated "
        "forwards, against the measured rate and the data sheet's; tokens are written ones.\n\n" + text
    )


def _exact(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        if "max_logp_diff" in line:
            what = f"{line['shape']} {line['image_tokens']}" if line["case"] == "equality" else line["case"]
            rows.append([what, f"{line['max_logp_diff']:.1e}", f"{line['mean_logp_diff']:.1e}", _grad(line)])
    head = ["packed against TRL's repeated rows", "log-probability, most", "mean", "gradient, worst tensor, relative"]
    return _table(head, rows)


def _memory(lines: Sequence[Line]) -> str:
    rows = [
        [
            line["case"],
            line["phase"],
            f"{line['estimate_gb']:.2f}",
            f"{line['measured_gb']:.2f}",
            f"{line['ratio']:.2f}",
        ]
        for line in lines
        if "estimate_gb" in line
    ]
    return _table(["shape, image tokens", "phase", "doctor's estimate, GB", "measured, GB", "ratio"], rows)


def _encoders(lines: Sequence[Line]) -> str:
    rows = [
        [line["encoder"], line["precision"], f"{line['tiles_per_second']:.0f}",
         f"{line['one_by_one_tiles_per_second']:.0f}", f"{line['min_cosine_to_float32']:.4f}"]
        for line in lines if "tiles_per_second" in line
    ]  # fmt: skip
    return _table(["encoder, 224 px", "precision", "tiles/s", "one by one", "lowest cosine to float32"], rows)


def _rest(lines: Sequence[Line]) -> str:
    told = [f"* `{e['part']}`: {headline(e)}." for e in lines if e.get("case") == "file to report"]
    told += [
        f"* `{e['part']}`: {headline(e)}." for e in lines if e.keys() & {"sft_loss_rel_diff", "tests", "ours_error"}
    ]
    for line in lines:
        if line["status"] in (ABSENT, SKIPPED):
            told.append(f"* `{line['part']}`: {line['status']} ({line['why']}).")
        elif line.get("error"):
            told.append(f"* `{line['part']}`: {line['status']}: {line['error'].splitlines()[-1][:200]}")
    return "\n".join(told)


def _cases(lines: Iterable[Line], case: str) -> list[Line]:
    return [line for line in lines if line.get("case") == case]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.3g}-{max(values):.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _grad(line: Line) -> str:
    return f"{line['max_grad_rel_diff']:.1e}"
