"""Slides of 256 to 16,384 patches through every path to one language model, against the prefix of all patches.

    python benchmarks/slide_models.py
    python benchmarks/slide_models.py --paths plain locpath --sizes 4096 --hidden 1024 --layers 12
    python benchmarks/slide_models.py --preset 7b                               # on a GPU
    python benchmarks/slide_models.py --features slide.h5 --sizes 1024 4096     # patches of a real slide

The paths are in `slide_paths.py`, their compressors as published (defaults of `models.compressors`), all weights
random. The language model is of one shape in a run, and trained by adapters of rank 128, as LoC-Path's is (methods
2.2); `--lora 0` trains all its weights. Every path and size runs in a process of its own:

- `prepare_seconds`: compressors without parameters (stm, pool, keep), once a slide, outside the model; not in FLOPs.
- `prefill_seconds`: from prepared rows to the first logits: compressors, aligner, language model; no gradients.
- `train_seconds`: forward, backward and optimizer step (AdamW) over the supervised batch of one case.
- `flops`: of the prefill, by formula (`models.cost`, methods 9.2). `train_flops`: three forwards with all logits, two
  through frozen weights.
- `*_peak_mb`: peak memory in 10^6 bytes of the prefill, and of the training step: the resident set of the process on
  a CPU (`bare_mb` of it was there before the model was made: libraries), what is allocated on a GPU. `*_above_mb`:
  less what was in use when the model had been loaded.
- `fixed_mb`: what forward and backward of the language model take at their peak, over what was in use before, where
  the visual tokens are given; `null` where nothing is learned before them.

One JSON line. Of LoC-Path against the plain prefix at N = 4,096 (else at the largest size): `flops_saved` of the
prefill and `memory_saved` of the training step, 1 - ours / theirs, with the libraries counted on both sides;
`memory_saved_less_libraries` without; `prefill_ratio` and `train_step_ratio`, theirs over ours, of medians.
`fixed_growth` is the largest `fixed_mb` of a path over its smallest. `repeats` in a row are those of prefill and step:
none begins after --seconds. `others_busy` is the fraction of the cores' time that other processes took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.measure import Others, Peak, give, machine, run_worker, settle, timed, versions
from benchmarks.shapes import PRESETS, shape
from benchmarks.slide_paths import BUDGETS, PATHS, build, cut, write_slide
from frugalpath.errors import InputError, entry
from frugalpath.slides.store import read_features

SIZES = [256, 512, 1024, 2048, 4096, 8192, 16384]
WARM = 16
"""Patches of the slide that warms up."""
PANELS = {
    "tokens": "visual tokens", "flops": "FLOPs of the prefill", "train_peak_mb": "peak memory of a step, MB",
    "prefill_seconds": "prefill, s", "train_seconds": "training step, s",
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS), metavar="PATH")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="patches at 20x")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="no repeat of a measurement begins after so long")
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model (small)")
    parser.add_argument("--layers", type=int, default=8, help="its depth (small)")
    parser.add_argument("--text-tokens", type=int, default=64, help="words of the question, a token each")
    parser.add_argument("--answer-tokens", type=int, default=64, help="words of the answer, a token each")
    parser.add_argument("--lora", type=int, default=128, help="rank of the adapters; 0 trains the model's own weights")
    parser.add_argument("--features", help="feature file (HDF5) of a real slide, of whose middle patches are taken")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that the benchmark may use")
    parser.add_argument("--out", default="runs/benchmarks/slide_models.png", help="picture")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def train_flops(performer: Any, prompt: Any, length: int, frozen: bool) -> float:
    """FLOPs of a training step over a row of `length` positions: 3 forwards, 2 through frozen weights."""
    reading = performer.shape.train(length, length) * (2 / 3 if frozen else 1)
    if not performer.config.in_text:
        reading += 3 * performer.model.model.routes.flops(length, prompt.visual)
    return reading + 3 * performer.seeing(prompt.views)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one path at one size."""
    import torch
    from peft import get_peft_model

    from frugalpath.envs.case import Case
    from frugalpath.models.build import PerformerConfig, lora_config
    from frugalpath.sft.supervised import BudgetCollator

    torch.set_num_threads(options.cores)
    path, n = options.worker[0], int(options.worker[1])
    budget, peak = BUDGETS.get(path, n), Peak(options.device)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"warm": min(WARM, n), "slide": n}
        files = {name: write_slide(Path(folder) / name, path, size, options.features) for name, size in sizes.items()}
        bare = peak.reset()
        performer = build(options, path, files)
        model, loaded = performer.model, peak.reset()
        seconds: list[float] = []

        def prepare(tokens: Any, asked: int) -> Any:
            made: list[Any] = []
            seconds.extend(timed(lambda: made.append(performer.chain.prepare(tokens, asked)), "cpu", 1, 0))
            return made[0]

        performer.bank.prepare("slide", [budget], "timed", prepare)
        question, answer = " a" * options.text_tokens, " a" * options.answer_tokens
        cases = {name: Case(name, name, "open", question, answer, slides=(name,)) for name in sizes}
        prompts = {name: performer.prompt(case, budget) for name, case in cases.items()}
        collate = BudgetCollator(performer, list(cases.values()), [budget], 0.0, 0)
        batches = {name: _on(options.device, collate.batch([case], budget)) for name, case in cases.items()}
    prompt, batch = prompts["slide"], batches["slide"]
    length = batch["input_ids"].shape[1]
    row: dict[str, Any] = {
        "path": path,
        "n": n,
        "prepared": len(prompt.views[0].rows),
        "tokens": prompt.visual,
        "in_text": sum(map(len, prompt.views)),
        "flops": performer.flops(prompt, 1),
        "train_flops": train_flops(performer, prompt, length, options.lora > 0),
        "prepare_seconds": round(seconds[0], 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }

    def took(part: str, call: Any) -> int:
        peak.reset()
        spent = timed(call, options.device, options.repeats, options.seconds)
        row[f"{part}_seconds"] = round(statistics.median(spent), 4)
        row[f"{part}_range"] = [round(min(spent), 4), round(max(spent), 4)]
        row[f"{part}_peak_mb"] = round(peak.read() / 1e6, 1)
        row[f"{part}_above_mb"] = round((peak.read() - loaded) / 1e6, 1)
        return len(spent)

    @torch.no_grad()
    def read(name: str) -> None:
        views = performer.processor.sight.inputs(model, [prompts[name].views])
        inputs = _on(options.device, {"input_ids": prompts[name].ids[None], **views})
        model(**inputs, logits_to_keep=1)

    model.eval()
    read("warm")
    repeats = [took("prefill", lambda: read("slide"))]

    net = model
    if options.lora:
        adapters = lora_config(PerformerConfig(lora={"r": options.lora, "lora_alpha": options.lora}), model)
        assert adapters is not None
        net = get_peft_model(model, adapters)
        row["train_flops"] += 3 * 2.0 * length * sum(p.numel() for k, p in net.named_parameters() if "lora_" in k)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(name: str) -> None:
        net(**batches[name]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    net.train()
    row["fixed_mb"] = _fixed(net, model, batch, peak) if model.model.compressor.learned else None
    optimizer.zero_grad()
    step("warm")
    repeats.append(took("train", lambda: step("slide")))
    memory = {"bare_mb": round(bare / 1e6, 1), "loaded_mb": round(loaded / 1e6, 1)}
    return row | memory | {"repeats": repeats}


def _on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) for k, v in inputs.items()}


def _fixed(net: Any, model: Any, batch: dict[str, Any], peak: Peak) -> float:
    """MB that forward and backward take where the visual tokens are given."""
    import torch

    backbone = model.model
    with torch.no_grad():
        blocks = backbone.visual_tokens(batch["pixel_values"], batch["shown"], batch.get("questions"))
    given = [block.requires_grad_() for block in blocks]
    backbone.visual_tokens = lambda *_: given
    before = peak.reset()
    net(**batch).loss.backward()
    took = peak.read() - before
    del backbone.visual_tokens
    return round(took / 1e6, 1)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Each quantity over the number of patches, a line a path, all axes logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(3.6 * len(PANELS), 3.6), layout="constrained")
    sizes = sorted({row["n"] for row in rows})
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="patches N", title=label)
        for path, own in itertools.groupby(rows, key=lambda row: row["path"]):
            points = [(row["n"], row[key]) for row in own]
            # Broken lines let those beneath them be seen.
            style = "o--" if path == "pathosynvlm_all" else "o-"
            axis.plot(*zip(*points, strict=True), style, ms=3, label=path)
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45)
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def compare(rows: list[dict[str, Any]], sizes: list[int]) -> dict[str, Any]:
    """LoC-Path against the plain prefix at one size; what grows although the visual tokens are given."""
    at = 4096 if 4096 in sizes else max(sizes)
    found = {row["path"]: row for row in rows if row["n"] == at}
    result: dict[str, Any] = {"at": at}
    if {"plain", "locpath"} <= found.keys():
        plain, ours = found["plain"], found["locpath"]

        def saved(key: str, less: str | None = None) -> float:
            mine, theirs = (row[key] - (row[less] if less else 0) for row in (ours, plain))
            return round(1 - mine / theirs, 4)

        result |= {
            "flops_saved": saved("flops"),
            "memory_saved": saved("train_peak_mb"),
            "memory_saved_less_libraries": saved("train_peak_mb", "bare_mb"),
            "train_flops_saved": saved("train_flops"),
            "prefill_memory_saved": saved("prefill_peak_mb"),
            "prefill_ratio": round(plain["prefill_seconds"] / ours["prefill_seconds"], 2),
            "train_step_ratio": round(plain["train_seconds"] / ours["train_seconds"], 2),
        }
    fixed: dict[str, list[float]] = {}
    for row in rows:
        if row["fixed_mb"] is not None:
            fixed.setdefault(row["path"], []).append(row["fixed_mb"])
    return result | {"fixed_growth": {k: round(max(v) / min(v), 3) for k, v in fixed.items()}}


@entry
def main() -> None:
    """Run every path at every size, draw, and print one JSON line."""
    import torch
    import transformers

    options = parse()
    settle(options)
    if options.worker:
        give(work(options))
        return
    if min(options.sizes) < 1:
        raise InputError(f"--sizes {min(options.sizes)}: a slide has at least 1 patch")
    if options.features:
        cut(read_features(options.features), max(options.sizes))
    rows, others = [], Others()
    for path, n in itertools.product(options.paths, options.sizes):
        meanwhile = Others()
        arguments = [*sys.argv[1:], "--worker", path, str(n)]
        rows.append(run_worker(__file__, arguments, f"{path} at {n} patches") | {"others_busy": meanwhile.busy()})
        print(f"{path} {n}: step {rows[-1]['train_seconds']} s", file=sys.stderr)
    busy = others.busy()
    draw(rows, Path(options.out))
    made = {k: v for k, v in shape(options).items() if k != "tower"}
    result = {
        **compare(rows, options.sizes),
        "rows": rows,
        "repeats": options.repeats,
        "statistic": "median of repeats",
        "others_busy": busy,
        "language_model": made,
        "machine": machine(options.device),
        "options": {k: v for k, v in vars(options).items() if k != "worker"},
        "versions": versions(torch, transformers),
        "command": " ".join(["python", "benchmarks/slide_models.py", *sys.argv[1:]]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
