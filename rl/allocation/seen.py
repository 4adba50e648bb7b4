"""What a performer has said about cases at some rungs, as the inputs of forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logit

from envs.score_table import ScoreTable

SURE = 1e-4
"""Confidences are taken as within this of 0 and 1, so that their logits are bounded."""


@dataclass(frozen=True)
class Seen:
    """What a performer said about N cases at K rungs; what has not been asked yet is never read.

    Args:
        confidence: (N, K) in 0..1. text: (N, K) answers. questions: (N,) kinds.
    """

    confidence: np.ndarray
    text: np.ndarray
    questions: np.ndarray

    @classmethod
    def of(cls, confidence: np.ndarray, text: Sequence[Sequence[str]], questions: Sequence[str]) -> Seen:
        """From the texts of the answers, N lists of K."""
        return cls(
            confidence, np.array([list(row) for row in text], dtype=np.str_), np.array(questions, dtype=np.str_)
        )

    @classmethod
    def of_table(cls, table: ScoreTable) -> Seen:
        """From a table whose columns are the rungs."""
        return cls.of(table.confidence, table.text, table.questions)

    def at(self, cases: np.ndarray) -> Seen:
        """Some of the cases."""
        return Seen(self.confidence[cases], self.text[cases], self.questions[cases])

    def features(self, last: int, looked: np.ndarray, kinds: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Inputs (N, F) of a forecast after a look at rung `last`.

        Args:
            looked: (N, K) rungs that were looked at, `last` or not. kinds: of question; others are none of them.
            answers: those that are told apart, see `common_answers`.
        """
        sure = self.sure()
        earlier = looked & (np.arange(looked.shape[1]) != last)
        count = earlier.sum(1)
        before = np.where(earlier, sure, 0).sum(1) / count.clip(1)
        agree = (earlier & (self.text == self.text[:, last, None])).sum(1) / count.clip(1)
        kind = self.kind(kinds)
        answer = (self.answers(last)[:, None] == np.array(answers, dtype=np.str_)).astype(float)
        now = sure[:, last, None]
        any_before = count[:, None] > 0
        own = np.concatenate([now, any_before, before[:, None], agree[:, None], any_before * now], 1)
        return np.concatenate([np.ones((len(own), 1)), own, kind, kind * now, answer, answer * now], 1)

    def sure(self) -> np.ndarray:
        """Logits (N, K) of the confidences, scaled to -1..1."""
        return logit(self.confidence.clip(SURE, 1 - SURE)) / logit(1 - SURE)

    def kind(self, kinds: Sequence[str]) -> np.ndarray:
        """Which of the kinds of question a case has: (N, kinds), 0 or 1."""
        return (self.questions[:, None] == np.array(kinds, dtype=np.str_)).astype(float)

    def answers(self, rung: int) -> np.ndarray:
        """Answers (N,) at a rung, with the kind of question that they answer."""
        return np.char.add(np.char.add(self.questions, ": "), self.text[:, rung])


def common_answers(seen: Seen, least: int = 10) -> list[str]:
    """Answers that at least so many cases got at some rung; what is written once tells nothing."""
    common: set[str] = set()
    for rung in range(seen.text.shape[1]):
        found, count = np.unique(seen.answers(rung), return_counts=True)
        common |= set(found[count >= least].tolist())
    return sorted(common)
