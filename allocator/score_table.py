"""Score tables: what a frozen performer scores on every case at every budget, and what that costs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from frugalpath.distributed import map_over_processes
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.files import atomic_write
from frugalpath.models.performer import Answer, Performer
from frugalpath.recipe.cache_key import reward_digest
from frugalpath.recipe.data import RunData, cases_digest, sha256_of
from frugalpath.rewards.scoring import Scorer

logger = logging.getLogger(__name__)

COLUMNS = ("score", "confidence", "visual", "prompt", "generated", "flops")


@dataclass
class ScoreTable:
    """Greedy answers of a performer to N cases at K budgets.

    Args:
        ids, patients, questions: of the cases, length N.
        budgets: K budgets in tokens; 0 shows no image.
        score: (N, K) in 0..1.
        confidence: (N, K) probability that the performer gave its answer, in 0..1.
        visual, prompt, generated: (N, K) token counts.
        flops: (N, K) of every answer, compressors or vision tower included.
        text: completions, N lists of K.
        made_of: digests of what the answers and the scores depend on, see `TableKey`; empty in earlier versions.
    """

    ids: list[str]
    patients: list[str]
    questions: list[str]
    budgets: list[int]
    score: np.ndarray
    confidence: np.ndarray
    visual: np.ndarray
    prompt: np.ndarray
    generated: np.ndarray
    flops: np.ndarray
    text: list[list[str]]
    made_of: dict[str, str] = field(default_factory=dict)

    def at(self, budgets: Sequence[int]) -> ScoreTable:
        """The columns of some budgets."""
        keep = [self.budgets.index(b) for b in budgets]
        arrays = {k: getattr(self, k)[:, keep] for k in COLUMNS}
        text = [[row[k] for k in keep] for row in self.text]
        return replace(self, budgets=list(budgets), text=text, **arrays)

    @property
    def digest(self) -> str:
        """SHA-256 of what a fit learns from: the cases and their scores."""
        return sha256_of([self.ids, self.budgets, self.score.tolist()])

    def save(self, path: str | Path) -> None:
        """Write as JSON lines, one case a line, atomically."""
        with atomic_write(path) as part, part.open("w") as file:
            file.write(
                json.dumps({"budgets": self.budgets, **({"made_of": self.made_of} if self.made_of else {})}) + "\n"
            )
            for i, name in enumerate(self.ids):
                row: dict[str, Any] = {"id": name, "patient": self.patients[i], "question": self.questions[i]}
                for key in COLUMNS:
                    row[key] = getattr(self, key)[i].tolist()
                file.write(json.dumps({**row, "text": self.text[i]}) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ScoreTable:
        """Read what `save` wrote.

        Raises:
            InputError: an earlier version wrote it.
        """
        head, *rows = (json.loads(line) for line in Path(path).read_text().splitlines())
        if rows and (missing := [k for k in COLUMNS if k not in rows[0]]):
            raise InputError(f"{path}: has no {', '.join(missing)}, as earlier versions wrote it; delete the file")
        fields: dict[str, Any] = {k: np.array([r[k] for r in rows]) for k in COLUMNS}
        fields |= {f"{k}s": [r[k] for r in rows] for k in ("id", "patient", "question")}
        text = [r["text"] for r in rows]
        return cls(budgets=head["budgets"], text=text, made_of=head.get("made_of", {}), **fields)


def chosen(values: np.ndarray, rungs: np.ndarray) -> np.ndarray:
    """Per-case values (N,) of a table (N, K) at the chosen rungs (N,)."""
    return np.take_along_axis(values, rungs[:, None], 1)[:, 0]


@dataclass(frozen=True)
class TableKey:
    """Digests of what a table depends on.

    Args:
        answers: of performer, cases as it sees them, and length of the answers. scores: of gold answers and rewards.
    """

    answers: str
    scores: str

    @classmethod
    def of(cls, data: RunData, performer: Mapping[str, Any], cases: Sequence[Case]) -> TableKey:
        """For a performer that is known by the key of its stage.

        Args:
            cases: those that are answered.
        """
        run = data.run
        shown = [replace(c, answer="", extra={}, patient="", question="", split="train") for c in cases]
        rewards = [run.rewards, reward_digest(run), cases_digest(cases)]
        return cls(sha256_of([performer, cases_digest(shown), data.max_new_tokens]), sha256_of(rewards))


class RunTables(Mapping[str, ScoreTable]):
    """Tables of a stage's performer by split, kept under `tables/` of the run's folder; each is made when asked for.

    Args:
        name: of the stage. key: what the stage depended on. budgets: by default 0 (no image) and the ladder.
    """

    def __init__(
        self,
        data: RunData,
        name: str,
        performer: Performer,
        key: Mapping[str, Any],
        budgets: Sequence[int] | None = None,
    ):
        self.data, self.name, self.performer, self.key = data, name, performer, key
        self.budgets = list(budgets) if budgets is not None else [0, *data.run.ladder]
        self._known: dict[str, ScoreTable] = {}

    def __getitem__(self, split: str) -> ScoreTable:
        if split not in self._known:
            data, cases = self.data, self.data.splits[split]
            self._known[split] = score_table(
                self.performer,
                cases,
                self.budgets,
                data.scorer,
                data.max_new_tokens,
                data.run.evaluation.batch_size,
                data.run.folder / "tables" / f"{self.name}.{split}.jsonl",
                label=f"{self.name} on {split}",
                key=TableKey.of(data, self.key, cases),
            )
        return self._known[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data.splits)

    def __len__(self) -> int:
        return len(self.data.splits)


def score_table(
    performer: Performer,
    cases: Sequence[Case],
    budgets: Sequence[int],
    scorer: Scorer,
    max_new_tokens: int,
    batch_size: int = 128,
    path: str | Path | None = None,
    label: str = "scoring",
    key: TableKey | None = None,
) -> ScoreTable:
    """Answer every case at every budget, the cases shared out over the processes; every process gets the whole table.

    A table that is there already is read instead, as long as it has these cases and is known by this key. Where only
    gold answers or rewards have changed since, its answers are scored again, and those of an earlier version, whose
    tables do not say what they were scored by.

    Args:
        path: where it is kept. key: None takes what is there for it.
    """
    state = PartialState()
    kept = ScoreTable.load(path) if path is not None and Path(path).is_file() else None
    if kept is not None and path is not None and _same_answers(kept, cases, budgets, key):
        if key is None or kept.made_of.get("scores") == key.scores:
            return kept.at(budgets)
        if kept.made_of:
            logger.warning("%s: gold answers, rewards or other columns have changed; answers are scored again", path)
        kept = _scored(kept, cases, scorer, key)
        # All processes have read it before one of them writes: one that found the new scores would not wait here.
        state.wait_for_everyone()
        if state.is_main_process:
            kept.save(path)
        state.wait_for_everyone()
        return kept.at(budgets)
    if kept is not None:
        logger.warning("%s: holds answers to other cases, or of another performer; it is made again", path)

    def answer(mine: list[int]) -> list[list[Answer]]:
        shown, columns = [cases[i] for i in mine], []
        total = len(mine) * len(budgets)
        with tqdm(total=total, desc=label, disable=not state.is_main_process, unit="answer") as bar:
            for budget in budgets:
                asked = [budget] * len(mine)
                columns.append(performer.answer(shown, asked, max_new_tokens, batch_size, bar.update))
        return [[column[k] for column in columns] for k in range(len(mine))]

    answers = map_over_processes(range(len(cases)), answer)
    score = np.zeros((len(cases), len(budgets)))
    counts: dict[str, Any] = {
        k: np.array([[getattr(a, k) for a in row] for row in answers]) for k in COLUMNS if k != "score"
    }
    table = ScoreTable(
        [c.id for c in cases],
        [c.patient for c in cases],
        [c.question for c in cases],
        list(budgets),
        score,
        text=[[a.text for a in row] for row in answers],
        **counts,
    )
    table = _scored(table, cases, scorer, key)
    if path is not None and state.is_main_process:
        table.save(path)
    state.wait_for_everyone()
    return table


def _same_answers(kept: ScoreTable, cases: Sequence[Case], budgets: Sequence[int], key: TableKey | None) -> bool:
    """Whether a table has the answers to these cases; one of an earlier version is known by their names alone."""
    if kept.ids != [c.id for c in cases] or not set(budgets) <= set(kept.budgets):
        return False
    return key is None or kept.made_of.get("answers", key.answers) == key.answers


def _scored(table: ScoreTable, cases: Sequence[Case], scorer: Scorer, key: TableKey | None) -> ScoreTable:
    """The table with its answers scored."""
    columns = [
        scorer([row[k] for row in table.text], cases, [b] * len(cases), table.visual[:, k].tolist())
        for k, b in enumerate(table.budgets)
    ]
    return replace(
        table,
        patients=[c.patient for c in cases],
        questions=[c.question for c in cases],
        score=np.stack(columns, axis=1),
        made_of=asdict(key) if key else {},
    )
