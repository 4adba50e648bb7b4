"""The command `frugalpath`: every entry of the project by one name; each is imported only when it is run."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "grpo": ("frugalpath.rl.grpo", "train performer and allocator from a recipe, evaluate, write the report"),
    "sft": ("frugalpath.sft.train", "run only the supervised stages of a recipe"),
    "allocate": ("frugalpath.rl.allocate", "fit the allocator of a trained run"),
    "pareto": ("frugalpath.rl.pareto", "write the report of a trained run, or apply it to other cases (--transfer)"),
    "compare": ("frugalpath.evaluation.compare", "compare the reports of several runs in one plot"),
    "answer": ("frugalpath.deploy.answer", "answer a question about images or slides with a trained run"),
    "publish": ("frugalpath.deploy.publish", "export a trained run to one folder and upload it to the Hub"),
    "extract": ("frugalpath.slides.extract", "extract feature files from slides"),
    "count": ("frugalpath.slides.count", "count the tiles of slides at several magnifications"),
    "retrieve": ("frugalpath.sft.retrieve", "build and query an index of slides and reports"),
    "validate": ("frugalpath.rewards.validate", "check the cases and rewards of a recipe before training"),
    "doctor": ("frugalpath.doctor.__main__", "check this machine and estimate the memory and time of a recipe"),
}
"""Name -> module with a `main`, and what it does."""


def usage() -> str:
    """The help of `frugalpath`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: frugalpath COMMAND [arguments]\n\n"
        "Reinforcement-learning fine-tuning for pathology vision-language models that spend few visual tokens.\n\n"
        f"commands:\n{rows}\n\n"
        "`frugalpath COMMAND --help` shows a command's arguments. Each runs in one process; on several GPUs, start\n"
        "the training commands with `accelerate launch -m`: `accelerate launch -m frugalpath.rl.grpo ...`."
    )


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
    elif name in COMMANDS:
        sys.argv[:2] = [f"frugalpath {name}"]
        importlib.import_module(COMMANDS[name][0]).main()
    else:
        print(f"{usage()}\n\nunknown command {name!r}" if name else usage(), file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
