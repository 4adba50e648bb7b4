"""`bleu4`, `rouge_l`, `meteor`: similarity of an open answer to the gold text by common measures.

Three rules hold for all of them and are not the libraries'. An answer of the same words as the gold scores 1.0; the
libraries give less to short texts (BLEU-4 below four words, METEOR's penalty for fragments). Text without an
`<answer>` block scores 0, where the published code compares the whole completion. An answer longer than any report
(`MAX_WORDS`, `MAX_CHARS`) scores 0 unread, which bounds the time.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from rapidfuzz.distance import LCSseq

from frugalpath.errors import InputError, extra
from frugalpath.rewards.answer import Completion, extract_answer
from frugalpath.rewards.registry import column, reward, warn_unscorable

MAX_WORDS = 2_000
MAX_CHARS = 20_000
MAX_WITH_SYNONYMS = 500  # words
LONGEST_WORD = 64  # characters; what is longer is no word, and is neither stemmed (in quadratic time) nor remembered

_ALPHANUMERIC = re.compile(r"[a-z0-9]+")
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]+")


def bleu4_score(candidate: str, reference: str) -> float:
    """Sentence BLEU-4 in 0..1: uniform weights, NLTK's smoothing method 4, words split at white space, with case.

    Source: the open-text reward of BiRR4CPath.
    """
    return _compared(candidate, reference, str.split, _bleu4)


def rouge_l_score(candidate: str, reference: str) -> float:
    """ROUGE-L F1 in 0..1, as `rouge_score` computes it with its stemmer.

    Words are runs of a-z and 0-9 in lower case, those above three letters reduced by Porter's stemmer.
    """
    return _compared(candidate, reference, _rouge_words, _rouge_l)


def meteor_score(candidate: str, reference: str, synonyms: bool = False) -> float:
    """METEOR in 0..1, as NLTK's `single_meteor_score`: exact words, then Porter stems, then synonyms if asked for.

    Words are runs of letters and digits, or of punctuation, in lower case. With `synonyms` a text may have
    `MAX_WITH_SYNONYMS` of them, since each has to be looked up.

    Raises:
        InputError: `synonyms` without NLTK's WordNet on this machine.
    """
    score = functools.partial(_meteor, synonyms=synonyms)
    return _compared(candidate, reference, _synonym_words if synonyms else _meteor_words, score)


@reward("bleu4")
def bleu4(
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """Sentence BLEU-4 of the answer against the gold text; see `bleu4_score`.

    Args:
        completions: n completions.
        answer: gold texts.
        task: rows of another task than `open` are not scored; without the column all rows are.
        id: names rows in warnings.
        columns: not used.

    Returns:
        n values in 0..1: 1.0 for the words of the gold, 0.0 without an answer and for one longer than any report. None
        for rows of other tasks, and with a warning for rows whose gold text has no word or is itself that long.

    Example:
        >>> bleu4(["<answer>chronic gastritis</answer>"], answer=["chronic  gastritis"])
        [1.0]
    """
    return _scores("bleu4", bleu4_score, str.split, completions, answer, task, id)


@reward("rouge_l")
def rouge_l(
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    **columns: Any,
) -> list[float | None]:
    """ROUGE-L F1 of the answer against the gold text; see `rouge_l_score`. Otherwise as `bleu4`."""
    return _scores("rouge_l", rouge_l_score, _rouge_words, completions, answer, task, id)


@reward("meteor")
def meteor(
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str | None] | None = None,
    id: Sequence[str | None] | None = None,
    synonyms: bool = False,
    **columns: Any,
) -> list[float | None]:
    """METEOR of the answer against the gold text; see `meteor_score`. Otherwise as `bleu4`.

    Args:
        completions: n completions.
        answer: gold texts.
        task: as for `bleu4`.
        id: as for `bleu4`.
        synonyms: also match words that share a synset of WordNet, which NLTK must have on this machine.
        columns: not used.
    """
    if synonyms:
        _wordnet()  # its absence is an error of the recipe, whatever the rows
    score = functools.partial(meteor_score, synonyms=synonyms)
    return _scores("meteor", score, _synonym_words if synonyms else _meteor_words, completions, answer, task, id)


def _scores(
    name: str,
    score: Callable[[str, str], float],
    words: Callable[[str], list[str]],
    completions: Sequence[Completion],
    answer: Sequence[str],
    task: Sequence[str | None] | None,
    id: Sequence[str | None] | None,
) -> list[float | None]:
    n = len(completions)
    values: list[float | None] = []
    for completion, gold, row_task, row_id in zip(completions, answer, column(task, n), column(id, n), strict=True):
        if row_task not in (None, "open"):
            values.append(None)
        elif not isinstance(gold, str) or not _bounded(gold, words):
            warn_unscorable(name, str(row_id), "`answer` is not text, has no words or too many")
            values.append(None)
        else:
            values.append(score(extract_answer(completion) or "", gold))
    return values


def _compared(
    candidate: str,
    reference: str,
    words: Callable[[str], list[str]],
    score: Callable[[list[str], list[str]], float],
) -> float:
    """`score` of the words of two texts; 1.0 where they are the same, 0.0 where one has none or too many."""
    theirs, ours = _bounded(reference, words), _bounded(candidate, words)
    if not theirs or not ours:
        return 0.0
    return 1.0 if ours == theirs else min(1.0, float(score(ours, theirs)))  # rounding may leave a little more than 1


def _bounded(text: str, words: Callable[[str], list[str]]) -> list[str]:
    """Words of a text; none of one that is longer than any report."""
    found = words(text) if len(text) <= MAX_CHARS else []
    return found if len(found) <= MAX_WORDS else []


def _bleu4(candidate: list[str], reference: list[str]) -> float:
    with extra("text", "reward 'bleu4'"):  # imported here: a second, which most runs need not pay
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return sentence_bleu([reference], candidate, smoothing_function=SmoothingFunction().method4)


def _rouge_words(text: str) -> list[str]:
    return [_stem(word) if len(word) > 3 else word for word in _ALPHANUMERIC.findall(text.lower())]


def _rouge_l(candidate: list[str], reference: list[str]) -> float:
    common = LCSseq.similarity(candidate, reference)
    return 2 * common / (len(candidate) + len(reference))  # F1 of common / candidate and common / reference


def _meteor_words(text: str) -> list[str]:
    return _WORDS_AND_MARKS.findall(text.lower())


def _synonym_words(text: str) -> list[str]:
    words = _meteor_words(text)
    return words if len(words) <= MAX_WITH_SYNONYMS else []


def _meteor(candidate: list[str], reference: list[str], synonyms: bool) -> float:
    with extra("text", "reward 'meteor'"):
        from nltk.translate.meteor_score import single_meteor_score

    wordnet = SimpleNamespace(synsets=_synsets if synonyms else lambda word: ())
    return single_meteor_score(reference, candidate, stemmer=SimpleNamespace(stem=_stem), wordnet=wordnet)


def _stem(word: str) -> str:
    return _porter(word) if len(word) <= LONGEST_WORD else word


@functools.lru_cache(maxsize=1 << 16)
def _porter(word: str) -> str:
    return _stemmer().stem(word)


@functools.cache
def _stemmer() -> Any:
    with extra("text", "a reward that stems words"):
        from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _synsets(word: str) -> tuple[Any, ...]:
    return _lookup(word) if len(word) <= LONGEST_WORD else ()


@functools.lru_cache(maxsize=1 << 16)
def _lookup(word: str) -> tuple[Any, ...]:
    """The lemmas of all synsets of a word as those of one, which is all that METEOR asks for."""
    lemmas = {lemma.name(): lemma for synset in _wordnet().synsets(word) for lemma in synset.lemmas()}
    return (SimpleNamespace(lemmas=lemmas.values),)


@functools.cache
def _wordnet() -> Any:
    with extra("text", "reward 'meteor'"):
        from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:  # absent, incomplete
        file = f" ({error})" if isinstance(error, OSError) else ""
        raise InputError(
            f"reward 'meteor': `synonyms` needs NLTK's WordNet, which this machine does not have{file}; run "
            "`python -m nltk.downloader wordnet` (the environment variable NLTK_DATA names the folder), or leave "
            "`synonyms` false"
        ) from None
    return wordnet
