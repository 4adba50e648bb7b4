"""Export a trained run to one self-contained folder, and optionally upload it to the Hugging Face Hub.

    frugalpath publish --config RECIPE --to FOLDER [--merge]
    frugalpath publish --config RECIPE --to FOLDER --push USER/NAME
    frugalpath publish --to FOLDER --push USER/NAME                   # upload an existing folder

LoRA adapters are stored as adapters, and their base model is downloaded by name; `--merge` writes the full weights
instead. The folder includes none of the run's cases. The repository is private unless `--public`. See
docs/training.md.
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
"""Errors of the Hub's client: its own, those of the connection, and the one for an invalid repository name."""


def parser() -> argparse.ArgumentParser:
    """Build the parser of this command's arguments; all others belong to the recipe."""
    made = argparse.ArgumentParser(
        prog="frugalpath publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other arguments belong to the recipe: --config, --set section.key=value, --output_dir RUN ...",
    )
    made.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="output folder")
    made.add_argument("--merge", action="store_true", help="merge the adapters and write the full weights")
    made.add_argument("--base", metavar="NAME", help="Hub name of the adapters' base model; default: the recipe's")
    made.add_argument("--push", metavar="USER/NAME", help="also upload the folder to this model repository")
    made.add_argument("--public", action="store_true", help="create the repository as public")
    card = made.add_argument_group("model card")
    card.add_argument("--title", metavar="TEXT", help="title of the card")
    card.add_argument("--data", metavar="NAME", help="name of the data; default: the recipe's")
    card.add_argument("--data-license", metavar="TEXT", help="license of the data")
    card.add_argument("--license", metavar="ID", help="license of the model as a Hub identifier, such as apache-2.0")
    return made


def push(folder: Path, repo: str, token: str, public: bool) -> str:
    """Upload the files written by `publish`, and no others; return the repository's URL.

    Raises:
        InputError: the Hub refuses or cannot be reached, or `repo` is not a valid repository name.
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
    """Run the command line."""
    args, rest = parser().parse_known_args(sys.argv[1:])
    token = get_token() if args.push else None
    if args.push and not token:
        raise InputError("--push: no Hub token found; run `hf auth login` or set HF_TOKEN")
    if rest:
        if "--config" not in rest:
            raise InputError("--config: give the recipe that the run was trained with")
        run = parse_recipe(rest)
        if PartialState().num_processes > 1:
            raise InputError("the folder is written by one process: use `frugalpath publish`, not accelerate launch")
        about = About(args.title, args.data, args.data_license, args.license)
        publish(run, rest, args.to, about, args.merge, args.base)
    elif not args.push:
        raise InputError(
            "--config: give the recipe that the run was trained with, or --push to upload an existing folder"
        )
    files = uploads(args.to)
    size = sum((args.to / name).stat().st_size for name in files)
    print(f"{args.to}: {len(files)} files, {size / 1e6:.1f} MB")
    if token:
        print(push(args.to, args.push, token, args.public))


if __name__ == "__main__":
    main()
