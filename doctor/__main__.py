"""What this machine has, what a recipe needs, and whether it fits.

    python -m frugalpath.doctor
    python -m frugalpath.doctor --config configs/recipes/<x>.yaml --memory 80GB [--set ... --any_key value]

Exit status 1 where something that the recipe needs is missing, or it does not fit; 2 for a recipe that is wrong.
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
"""Share of a device that is left for what is not counted: CUDA's own, kernels' buffers, holes of the allocator."""
WIDTHS = {"efficientnet-lite0": 1280}
"""Width of the features of encoders that come with the package."""
WIDTH = 1024
"""Width of those of other encoders: a guess."""


def gigabytes(text: str) -> float:
    """Bytes from `80GB`, `80GiB` or `80`."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*(GB|GiB|)\s*", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 80GB or 40GiB")
    return float(match[1]) * (2**30 if match[2].lower() == "gib" else GB)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it belongs to the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m frugalpath.doctor",
        description=(__doc__ or "").splitlines()[0],
        epilog="Any other key belongs to the recipe.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", help="recipe")
    add("--memory", type=gigabytes, help="memory of one GPU, such as 80GB; default: this machine's")
    add("--processes", type=int, default=1, help="GPUs that share the run")
    add("--sharding", choices=SHARDINGS, default="ddp", help="what several GPUs divide")
    add("--text-tokens", type=int, default=Sizes.text, help="tokens of a question with its chat template")
    add("--answer-tokens", type=int, help="tokens of a gold answer; default: max_completion_length")
    add("--patches", type=int, default=Sizes.patches, help="features of a slide, for learned compressors")
    known = ", ".join(f"{width} of {name}" for name, width in WIDTHS.items())
    add("--feature-dim", type=int, help=f"width of stored features; default: {known}, {WIDTH} of others, a guess")
    add("--tflops", type=float, help="TFLOPs a second that the device can do; default: its data sheet, or measured")
    add("--bandwidth", type=float, help="TB of memory a second; default: as for --tflops")
    add("--mfu", type=float, default=0.4, help="share of them that training reaches; an assumption")
    add("--gpu", help="GPU by name where it is not here, for its rates: H100, A100, L40S ...")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_known_args(argv)


def place_and_limit(options: argparse.Namespace) -> tuple[Place, float]:
    """Where the recipe is to run, and how many bytes it may take there."""
    if options.memory:
        total = options.memory
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    elif options.gpu:
        raise InputError("--memory: state it for a GPU that is not here, such as --memory 80GB")
    else:
        memory = psutil.virtual_memory()
        return Place(False, options.processes, options.sharding), memory.available
    return Place(True, options.processes, options.sharding), (1 - RESERVE) * total


def rates(options: argparse.Namespace, place: Place) -> Speed:
    """Rates of the device: what was given, else a data sheet, else measured."""
    name = options.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    known = speed_of(name) or (None if place.gpu else measure_cpu())
    if options.tflops is None and known is None:
        known = speed_of("H100")
        assert known is not None
        known = Speed(known.flops, known.bytes, f"{known.source}; name yours with --gpu or --tflops")
    flops = options.tflops * 1e12 if options.tflops else known.flops if known else 0.0
    memory = options.bandwidth * 1e12 if options.bandwidth else known.bytes if known else float("inf")
    return Speed(flops, memory, "as given" if options.tflops else known.source if known else "")


def estimate(run: Run, options: argparse.Namespace) -> Estimate:
    """How the recipe fits, and what to change where it does not."""
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
    """Print the report."""
    options, rest = parse(sys.argv[1:])
    if rest and not options.config:
        raise InputError(f"{' '.join(rest)}: no such option without a recipe; give --config")
    run = parse_recipe(["--config", options.config, *rest]) if options.config else None
    machine = look(run.folder if run else Path("."))
    needed = needs(run) if run else []
    found = estimate(run, options) if run else None
    print(json.dumps(as_json(machine, needed, found)) if options.json else as_text(machine, needed, found))
    if any(c.ok is False for c in needed) or (found is not None and not found.fits):
        sys.exit(1)


if __name__ == "__main__":
    main()
