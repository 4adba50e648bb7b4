"""How alike two texts are, for fields of free text."""

from __future__ import annotations

import functools
import re

from rapidfuzz import fuzz

from frugalpath.rewards.label import normalise

# Words that turn the meaning of a finding: one on one side alone makes the texts different, however alike they are.
DECIDING = (
    {"no", "not", "without", "absent", "negative", "non", "none", "free", "denies"},
    {"left"}, {"right"}, {"bilateral"}, {"benign"}, {"malignant"}, {"invasive"}, {"situ"}, {"metastatic"},
    {"high"}, {"low"}, {"intermediate"}, {"well"}, {"moderately"}, {"poorly"}, {"upper"}, {"lower"},
    {"small"}, {"large"},
)  # fmt: skip
LENGTHS = 1.5  # the longer text may have this many times the words of the shorter before the surplus counts

_WORD = re.compile(r"[^\W_]+(?:\.[0-9]+)?[+%]?")


@functools.lru_cache(maxsize=1 << 14)
def similarity(gold: str, other: str) -> float:
    """Similarity of two texts in 0..1, case, white space and word order aside.

    rapidfuzz's token-set ratio (M 7.6), which calls a text equal to any other that contains its words. So that neither
    one word nor every word wins, texts of very different length are compared by the token-sort ratio, in which surplus
    counts; and texts that differ in a number or a deciding word (`DECIDING`) are not alike at all.
    """
    a, b = _read(gold), _read(other)
    if a[0] == b[0]:
        return 1.0
    if not a[1] or not b[1] or a[2] != b[2]:
        return 0.0
    shorter, longer = sorted((len(a[1]), len(b[1])))
    ratio = fuzz.token_set_ratio if longer <= LENGTHS * shorter else fuzz.token_sort_ratio
    return float(ratio(" ".join(a[1]), " ".join(b[1]))) / 100


@functools.lru_cache(maxsize=1 << 14)
def _read(text: str) -> tuple[str, list[str], tuple[object, ...]]:
    """Normalised text, its words, and what they decide; each entry of a list is compared with all others."""
    folded = normalise(text)
    words = _WORD.findall(folded)
    return folded, words, _decisions(words)


def _decisions(words: list[str]) -> tuple[object, ...]:
    found = set(words)
    return sorted(w for w in words if any(map(str.isdigit, w))), tuple(bool(found & group) for group in DECIDING)
