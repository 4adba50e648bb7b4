"""Publish a finished run: one folder with all that answering takes, which can go to a hub.

    python deploy/publish.py --config RECIPE --to FOLDER [--merge]
    python deploy/publish.py --config RECIPE --to FOLDER --push USER/NAME
    python deploy/publish.py --to FOLDER --push USER/NAME                   # one that is written already

A run with adapters keeps them as adapters over a base that is fetched by its name; `--merge` writes all weights.
Nothing of the run's cases is in the folder. The repository is private unless `--public`. See docs/training.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from frugalpath.deploy.publishing import publish, uploads
from frugalpath.errors import InputError, entry
from frugalpath.evaluation.report.card import About
from frugalpath.recipe.run import parse_recipe

# Of the HTTP library, another one in each version of the hub's, and of the operating system.
REFUSALS: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError)
"""What the Hub's client raises: its own errors, those of the connection, and for a name that is none."""


def parser() -> argparse.ArgumentParser:
    """Own arguments; the recipe's follow."""
    made = argparse.ArgumentParser(
        prog="python deploy/publish.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other arguments are the recipe's: --config, --set section.key=value, --output_dir RUN ...",
    )
    made.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    made.add_argument("--merge", action="store_true", help="write all weights, no adapters")
    made.add_argument("--base", metavar="NAME", help="name of the model under the adapters, if not the recipe's")
    made.add_argument("--push", metavar="USER/NAME", help="also upload it to this model repository")
    made.add_argument("--public", action="store_true", help="make a new repository public")
    card = made.add_argument_group("the model card")
    card.add_argument("--title", metavar="TEXT")
    card.add_argument("--data", metavar="NAME", help="name of the data; by default the recipe's")
    card.add_argument("--data-license", metavar="TEXT")
    card.add_argument("--license", metavar="ID", help="of the model, as the Hub writes it, such as apache-2.0")
    return made


def push(folder: Path, repo: str, token: str, public: bool) -> str:
    """Upload what publishing wrote into a folder, and nothing else; returns the address.

    Raises:
        InputError: the Hub refuses, cannot be reached, or `repo` is no name of a repository.
    """
    files = uploads(folder)
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        told = api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files)
    except REFUSALS as error:
        raise InputError(f"--push {repo}: {error}") from error
    return str(told.repo_url)


@entry
def main() -> None:
    """Publish."""
    args, rest = parser().parse_known_args(sys.argv[1:])
    token = get_token() if args.push else None
    if args.push and not token:
        raise InputError("--push: there is no token of the Hub; run `hf auth login`, or set HF_TOKEN")
    if rest:
        if "--config" not in rest:
            raise InputError("--config: name the recipe that the run was trained by")
        run = parse_recipe(rest)
        if PartialState().num_processes > 1:
            raise InputError(
                "one process writes the folder: start deploy/publish.py with python, not accelerate launch"
            )
        about = About(args.title, args.data, args.data_license, args.license)
        publish(run, rest, args.to, about, args.merge, args.base)
    elif not args.push:
        raise InputError("--config: name the recipe that the run was trained by, or --push what is published already")
    files = uploads(args.to)
    size = sum((args.to / name).stat().st_size for name in files)
    print(f"{args.to}: {len(files)} files, {size / 1e6:.1f} MB")
    if token:
        print(push(args.to, args.push, token, args.public))


if __name__ == "__main__":
    main()
