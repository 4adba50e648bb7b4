"""`choice`: the answer names the right one of the row's options."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frugalpath.rewards.answer import Completion, extract_answer
from frugalpath.rewards.registry import column, reward, warn_unscorable

# Punctuation that may stand around an answer. What changes the meaning is not in it: HER2+ and HER2-, <5 mm and
# >5 mm, .5 and 5 are different answers.
_BEFORE = " :;\"'`*_«»¿¡"
_AFTER = " .,:;!?\"'`*_«»…、。"
_BRACKETS = "()[]{}"
_SAME = str.maketrans({**dict.fromkeys("‐‑‒–—−", "-"), **dict.fromkeys("‘’", "'"), **dict.fromkeys("“”„", '"')})
# "(a) benign", "a) benign", "a. benign", "a: benign", once normalised; "1.5 mm" has no label.
_LABELLED = re.compile(r"(?:\(([a-z]|[0-9]{1,2})\)|([a-z]|[0-9]{1,2})(?:\)|[.:](?= )))(.+)")


@dataclass(frozen=True, slots=True)
class Options:
    """What names each of a row's options."""

    texts: Mapping[str, int]  # normalised text -> position
    labels: Mapping[str, int]  # letter or number -> position
    longest: int  # characters of the longest option as written


def normalise(text: str) -> str:
    """Unicode NFKC, case folded, one kind of hyphen and quotation mark, single spaces, no marks at the ends."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.translate(_SAME).split()).lstrip(_BEFORE).rstrip(_AFTER)


@functools.lru_cache(maxsize=4096)
def read_options(options: tuple[str, ...]) -> Options | None:
    """Index a row's options; None when two of them read the same or one is empty.

    Options that carry labels in sequence, `("(A) benign", "(B) malignant")`, are also named by their texts alone.
    Others are lettered by position, as prompts list them. Numbers are labels only where the options carry them: with
    the options `grade 0` and `grade 1` the answer `1` is not the first.
    """
    written = [normalise(option) for option in options]
    texts = [_bare(text) for text in written]
    labels = list(string.ascii_lowercase[: len(options)])
    labelled = [_LABELLED.fullmatch(text) for text in written]
    own = [match[1] or match[2] for match in labelled if match]
    if own in (labels, [str(i + 1) for i in range(len(options))]):
        labels = own
        texts = [_bare(match[3]) for match in labelled if match]
    if not all(texts) or len(set(texts)) < len(texts):
        return None
    index = {name: i for names in (map(_bare, written), texts) for i, name in enumerate(names)}
    return Options(index, {label: i for i, label in enumerate(labels)}, max(map(len, options), default=0))


def find_option(answer: str, options: Options) -> int | None:
    """Position of the one option that an answer names and says nothing beyond; None when there is none."""
    if len(answer) > 4 * options.longest + 256:  # keeps a flood of text cheap; NFKC shortens less than fourfold
        return None
    text = normalise(answer)
    bare = _bare(text)
    if bare in options.texts:
        return options.texts[bare]
    if match := _LABELLED.fullmatch(text):
        label, named = options.labels.get(match[1] or match[2]), options.texts.get(_bare(match[3]))
        return label if label == named else None
    return options.labels.get(bare)


def _bare(text: str) -> str:
    """Normalised text without surrounding marks and brackets; text that is nothing else stays as it is."""
    return text.lstrip(_BEFORE + _BRACKETS).rstrip(_AFTER + _BRACKETS) or text


@reward("choice")
def choice(
    completions: Sequence[Completion],
    answer: Sequence[str],
    options: Sequence[Sequence[str] | None] | None = None,
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 when the answer names the gold option and nothing else, 0.0 otherwise.

    Case, white space, Unicode form and surrounding punctuation do not matter. An option may be named by its text, by
    its letter (`(B)`, `b)`, `B`), or by both when they agree. An answer that names two options, or says anything
    beyond one, is wrong.

    Args:
        completions: n completions.
        answer: gold answers, each one of the row's options.
        options: the options of each row.
        task: rows of another task than `choice` are not scored; without the column all rows are.
        id: names rows in warnings.
        columns: not used.

    Returns:
        n values; None for rows of other tasks, and with a warning for rows without usable options or gold answer.

    Example:
        >>> choice(["<answer>(B) Malignant</answer>"], answer=["malignant"], options=[["benign", "malignant"]])
        [1.0]
    """
    n = len(completions)
    values: list[float | None] = []
    for completion, gold, row_options, row_task, row_id in zip(
        completions, answer, column(options, n), column(task, n), column(id, n), strict=True
    ):
        if row_task not in (None, "choice"):
            values.append(None)
            continue
        listed = isinstance(row_options, Iterable) and not isinstance(row_options, str)
        names = read_options(tuple(map(str, row_options))) if listed else None
        right = find_option(str(gold), names) if names else None
        if names is None or right is None:
            problem = "`answer` is not exactly one of `options`, or two options read the same"
            warn_unscorable("choice", str(row_id), problem)
            values.append(None)
            continue
        text = extract_answer(completion)
        values.append(float(text is not None and find_option(text, names) == right))
    return values
