"""Check this machine, what a recipe needs, and whether the recipe fits.

    frugalpath doctor
    frugalpath doctor --config configs/recipes/<x>.yaml --memory 80GB [--set ... --any_key value]

Exit status: 1 if a requirement of the recipe is missing or it does not fit in memory, 2 if the recipe is invalid.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import psutil
import torch

from frugalpath.doctor.fit import GB, SHARDINGS, Place, fit, peak, weigh
from frugalpath.doctor.jobs import Sizes, jobs_of
from frugalpath.doctor.knobs import turned
from frugalpath.doctor.machine import Speed, look, measure_cpu, speed_of
from frugalpath.doctor.needs import images, needs
from frugalpath.doctor.report import Estimate, as_json, as_text
from frugalpath.doctor.speed import cost_of
from frugalpath.doctor.subject import Subject
from frugalpath.errors import InputError, entry
from frugalpath.recipe.run import Run, parse_recipe

RESERVE = 0.1
"""Share of GPU memory kept free for the CUDA context, kernel buffers and fragmentation, which are not estimated."""
WIDTHS = {"efficientnet-lite0": 1280}
"""Feature width of the packaged encoders."""
WIDTH = 1024
"""Assumed feature width of other encoders."""


def gigabytes(text: str) -> float:
    """Parse `80GB`, `80GiB` or `80` into bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(GB|GiB|)\s*", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"expected a size such as 80GB or 40GiB, got {text!r}")
    return float(match[1]) * (2**30 if match[2].lower() == "gib" else GB)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into this command's options and the recipe's arguments."""
    parser = argparse.ArgumentParser(
        prog="frugalpath doctor",
        description=(__doc__ or "").splitlines()[0],
        epilog="All other arguments belong to the recipe.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", help="recipe file")
    add("--memory", type=gigabytes, help="memory of one GPU, such as 80GB; default: this machine's")
    add("--processes", type=int, default=1, help="number of GPUs")
    add("--sharding", choices=SHARDINGS, default="ddp", help="how weights are sharded over several GPUs")
    add("--text-tokens", type=int, default=Sizes.text, help="text tokens of a prompt, including the chat template")
    add("--answer-tokens", type=int, help="tokens of a gold answer; default: max_completion_length")
    add("--patches", type=int, default=Sizes.patches, help="patch features per slide, for learned compressors")
    known = ", ".join(f"{width} for {name}" for name, width in WIDTHS.items())
    add("--feature-dim", type=int, help=f"width of stored features; default: {known}, {WIDTH} (assumed) for others")
    add("--tflops", type=float, help="peak TFLOPS of the device; default: from its data sheet, or measured")
    add("--bandwidth", type=float, help="memory bandwidth in TB/s; default: as for --tflops")
    add("--mfu", type=float, default=0.4, help="assumed share of the peak TFLOPS that training reaches")
    add("--gpu", help="name of a GPU that is not in this machine: H100, A100, L40S ...")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_known_args(argv)


def place_and_limit(options: argparse.Namespace) -> tuple[Place, float]:
    """Return the target device and its usable memory in bytes."""
    if options.memory:
        total = options.memory
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    elif options.gpu:
        raise InputError("--memory: required for a GPU that is not in this machine, such as --memory 80GB")
    else:
        memory = psutil.virtual_memory()
        return Place(False, options.processes, options.sharding), memory.available
    return Place(True, options.processes, options.sharding), (1 - RESERVE) * total


def rates(options: argparse.Namespace, place: Place) -> Speed:
    """Return the device's compute and memory rates: as given, from a data sheet, or measured."""
    name = options.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    known = speed_of(name) or (None if place.gpu else measure_cpu())
    if options.tflops is None and known is None:
        known = speed_of("H100")
        assert known is not None
        known = Speed(known.flops, known.bytes, f"{known.source}; set yours with --gpu or --tflops")
    flops = options.tflops * 1e12 if options.tflops else known.flops if known else 0.0
    memory = options.bandwidth * 1e12 if options.bandwidth else known.bytes if known else float("inf")
    return Speed(flops, memory, "as given" if options.tflops else known.source if known else "")


def estimate(run: Run, options: argparse.Namespace) -> Estimate:
    """Estimate memory and time of the recipe, and what to change if it does not fit."""
    place, limit = place_and_limit(options)
    sizes = Sizes(options.text_tokens, options.answer_tokens, options.patches)
    width = options.feature_dim or WIDTHS.get(run.encoder.name, WIDTH)
    subject, count = Subject.of(run.performer, width), images(run)
    phases, jobs = fit(run, subject, sizes, place, count), jobs_of(run, subject, sizes)
    speed = rates(options, place)
    over = peak(phases).peak > limit
    grpo = next(job for job in jobs if job.name == "grpo")
    return Estimate(
        weights=weigh(subject, grpo.trains, grpo.optimizer),
        phases=phases,
        costs=[cost_of(subject, job, speed, options.mfu) for job in jobs],
        limit=limit,
        knobs=turned(run, subject, sizes, place, count, phases) if over else [],
        place=place,
        sizes=sizes,
        speed=speed,
        mfu=options.mfu,
    )


@entry
def main() -> None:
    """Run the command line."""
    options, rest = parse(sys.argv[1:])
    if rest and not options.config:
        raise InputError(f"{' '.join(rest)}: unknown option; recipe arguments need --config")
    run = parse_recipe(["--config", options.config, *rest]) if options.config else None
    machine = look(run.folder if run else Path("."))
    needed = needs(run) if run else []
    found = estimate(run, options) if run else None
    print(json.dumps(as_json(machine, needed, found)) if options.json else as_text(machine, needed, found))
    if any(c.ok is False for c in needed) or (found is not None and not found.fits):
        sys.exit(1)


if __name__ == "__main__":
    main()
