"""Search slides by text and texts by slide, and measure retrieval quality.

    frugalpath retrieve build --model MODEL --manifest pairs.csv --index INDEX
    frugalpath retrieve query --index INDEX --text "carcinoma, grade 3" -k 5
    frugalpath retrieve query --index INDEX --slide slide.h5
    frugalpath retrieve evaluate --index INDEX [--prompts prompts.yaml --labels labels.csv]

The manifest has columns `slide`, `text`, `patient` and `id`; `--config recipe.yaml` uses the open and synoptic cases
of a recipe instead. The prompts map each class to its descriptions. The labels are rows of `id` and `label`, or, with
`--config recipe.yaml --question diagnosis`, the answers to a question about the same slides. Output is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugalpath.envs.rows import read_rows
from frugalpath.errors import InputError, entry
from frugalpath.models.retrieval import Embedder, RetrievalIndex, class_probabilities, class_vectors
from frugalpath.parsing import read_yaml
from frugalpath.rewards.retrieval import retrieval
from frugalpath.rewards.zero_shot import classification
from frugalpath.sft.pairs import FeatureFiles, from_manifest, from_recipe, recipe_labels


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Embed slides and texts and write an index."""
    if options.manifest:
        items, files = from_manifest(Path(options.manifest))
    else:
        items, files = from_recipe(options.config, options.split, options.question)
    index = RetrievalIndex.build(Embedder.load(options.model), items, files)
    index.encoder = files.encoder
    index.save(options.index)
    return {"index": options.index, "slides": len(items), "distinct_texts": len(index.texts), "encoder": files.encoder}


def query(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the k best matches for a text or a slide."""
    index = RetrievalIndex.load(options.index, options.model)
    if options.text is not None:
        return index.query_text(options.text, options.k)
    files = FeatureFiles([[options.slide]])
    files.encoder = index.encoder
    return index.query_slide(files[0], options.k)


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure retrieval and, with prompts and labels, zero-shot classification."""
    index = RetrievalIndex.load(options.index, options.model)
    scores, items = index.pairs()
    if not items:
        raise InputError(f"{options.index}: none of its slides has a text; rebuild it with texts")
    texts, patients = [str(item.text) for item in items], [item.patient for item in items]
    found = {"retrieval": retrieval(scores, texts, patients, options.resamples)}
    if options.prompts:
        if options.labels:
            labels = read_labels(Path(options.labels), index)
        else:
            labels = recipe_labels(options.config, options.question, index)
        found["zero_shot"] = zero_shot(index, Path(options.prompts), labels, options.resamples)
    return found


def zero_shot(index: RetrievalIndex, prompts: Path, labels: dict[int, str], resamples: int) -> dict[str, Any]:
    """Measure zero-shot classification on the labelled slides.

    Raises:
        InputError: the prompts are not a mapping of classes to texts.
    """
    if not prompts.is_file():
        raise InputError(f"{prompts}: no such file; expected a YAML file that maps each class to its descriptions")
    classes = read_yaml(prompts)
    if not isinstance(classes, dict):
        raise InputError(f"{prompts}: expected a mapping of each class to a list of texts")
    at, named = list(labels), list(labels.values())
    classes = {str(name): texts for name, texts in classes.items()}
    vectors = class_vectors(index.embedder, classes)
    values = class_probabilities(index.embedder, index.slide_vectors[at], vectors).numpy()
    return classification(values, named, list(classes), [index.items[i].patient for i in at], resamples)


def read_labels(path: Path, index: RetrievalIndex) -> dict[int, str]:
    """Read labels of an index's slides from rows of `id` and `label`.

    Raises:
        InputError: a row has an unknown id or no label.
    """
    rows, problems = read_rows(path)
    number = {item.id: i for i, item in enumerate(index.items)}
    labels = {}
    for row in rows:
        name, label = str(row.values.get("id") or ""), str(row.values.get("label") or "")
        if name not in number or not label:
            problems.append(f"{row.at}: the id {name!r} is not in the index, or has no `label`")
            continue
        labels[number[name]] = label
    if problems:
        raise InputError(problems)
    return labels


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    made = {}
    for run in (build, query, evaluate):
        made[run] = commands.add_parser(run.__name__, help=str(run.__doc__))
        made[run].add_argument("--index", required=True, help="folder of the index")
        made[run].add_argument(
            "--model", required=run is build, help="folder of the model; default: the one that built the index"
        )
        made[run].set_defaults(run=run)
    source = made[build].add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", help="file with columns slide, text, patient and id")
    source.add_argument("--config", help="recipe whose cases are used")
    made[build].add_argument("--split", default="test", choices=("train", "val", "test"), help="split of the recipe")
    made[build].add_argument("--question", help="kind of question of the recipe's cases")
    asked = made[query].add_mutually_exclusive_group(required=True)
    asked.add_argument("--text", help="find slides that match this text")
    asked.add_argument("--slide", help="find texts that match this slide (.h5 feature file)")
    made[query].add_argument("-k", type=int, default=5, help="number of matches")
    made[evaluate].add_argument("--prompts", help="YAML file that maps each class to its descriptions")
    made[evaluate].add_argument("--labels", help="file with columns id and label")
    made[evaluate].add_argument("--config", help="recipe whose answers to --question are the labels")
    made[evaluate].add_argument("--question", help="kind of question of the recipe's cases")
    made[evaluate].add_argument("--resamples", type=int, default=2000, help="bootstrap resamples")
    options = parser.parse_args(argv)
    if options.run is evaluate:
        if bool(options.config) != bool(options.question):
            raise InputError("--config and --question: give both or neither")
        if bool(options.prompts) != bool(options.labels or options.config) or (options.labels and options.config):
            raise InputError("--prompts needs either --labels, or --config and --question")
    return options


@entry
def main() -> None:
    """Run the command line and print the result as JSON."""
    options = parse(sys.argv[1:])
    print(json.dumps(options.run(options), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
