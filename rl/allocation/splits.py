"""Answers of a frozen performer to cases whose slides have budgets of their own, kept in the run's folder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from envs.case import Case
from envs.score_table import ScoreTable
from models.performer import Performer
from rl.allocation.choice import Room, Split
from rl.scoring import Scorer
from slides.whole import whole

CHUNK = 2048
"""Answers between two writings of the table."""


@dataclass(frozen=True)
class Scored:
    """One answer: score in 0..1, realised visual tokens, tokens of prompt and completion, FLOPs, completion."""

    score: float
    visual: int
    prompt: int
    generated: int
    flops: float
    text: str


class SplitTable:
    """Answers by case and split; none is asked for twice, in this run or a later one.

    Args:
        path: JSON lines, one an answer; made if it is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[tuple[str, Split], Scored] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                key = row.pop("id"), tuple(row.pop("budgets"))
                self.rows[key] = Scored(**row)

    def take(self, table: ScoreTable, rooms: Sequence[Room], ladder: Sequence[int]) -> None:
        """Take over the answers of a table of equal shares, whose cases are those of the rooms."""
        table = table.at(ladder)
        for i, (name, room) in enumerate(zip(table.ids, rooms, strict=True)):
            for k, split in enumerate(room.equal):
                visual, prompt, written = (int(v[i, k]) for v in (table.visual, table.prompt, table.generated))
                score, flops = float(table.score[i, k]), float(table.flops[i, k])
                found = Scored(score, visual, prompt, written, flops, table.text[i][k])
                self.rows.setdefault((name, split), found)

    def ask(
        self,
        performer: Performer,
        cases: Sequence[Case],
        splits: Sequence[Sequence[Split]],
        scorer: Scorer,
        max_new_tokens: int,
        batch_size: int,
        label: str,
    ) -> list[list[Scored]]:
        """Answers of each case at its splits; the cases that lack some are shared out over the processes.

        What is answered is written whole every `CHUNK` answers, from where a stopped run goes on.
        """
        wanted = [(i, s) for i, (c, own) in enumerate(zip(cases, splits, strict=True)) for s in dict.fromkeys(own)]
        missing = [(i, s) for i, s in wanted if (cases[i].id, s) not in self.rows]
        # Of like cost, so that batches are even and slides of a budget are prepared once.
        missing.sort(key=lambda item: (sum(item[1]), item[0]))
        state = PartialState()
        chunks = range(0, len(missing), CHUNK)
        for at in tqdm(chunks, desc=label, disable=not state.is_main_process or not missing, unit="chunk"):
            mine = missing[at : at + CHUNK][state.process_index :: state.num_processes]
            shown = [cases[i] for i, _ in mine]
            budgets = [sum(s) for _, s in mine]
            answers = performer.answer(shown, budgets, max_new_tokens, batch_size, [s for _, s in mine])
            local = []
            if mine:
                scores = scorer([a.text for a in answers], shown, budgets, [a.visual for a in answers])
                local = [
                    (cases[i].id, split, Scored(float(score), a.visual, a.prompt, a.generated, a.flops, a.text))
                    for (i, split), score, a in zip(mine, scores, answers, strict=True)
                ]
            for name, split, row in gather_object(local) if state.num_processes > 1 else local:
                self.rows[name, tuple(split)] = row
            if state.is_main_process:
                self.save()
            state.wait_for_everyone()
        return [[self.rows[c.id, s] for s in own] for c, own in zip(cases, splits, strict=True)]

    def save(self) -> None:
        """Write all rows, whole or not at all."""
        with whole(self.path) as part, part.open("w") as file:
            for (name, split), row in self.rows.items():
                file.write(json.dumps({"id": name, "budgets": split, **asdict(row)}) + "\n")


def draw_splits(cases: Sequence[Case], rooms: Sequence[Room], count: int, seed: int) -> list[list[Split]]:
    """The equal splits of each case and up to `count` random ones, which depend on case and seed alone."""
    return [
        room.draw(count, np.random.default_rng([seed, zlib.crc32(case.id.encode())]))
        for case, room in zip(cases, rooms, strict=True)
    ]
