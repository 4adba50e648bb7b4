"""The share `split`: a budget for each slide of a case, by predicted score minus price times cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from envs.case import Case
from envs.score_table import ScoreTable
from models.allocators.look import CheapLook
from models.allocators.network import LookNetwork
from models.allocators.split import SplitAllocator, SplitConfig
from models.performer import Performer
from rl.allocation.choice import EXHAUSTIVE, Room, Split, SplitCost, greedy
from rl.allocation.fitting import by_patient, fit_by_patient, fit_rows, predict
from rl.allocation.splits import Scored, SplitTable, draw_splits
from rl.checkpoints import Clock, is_done, mark_done
from rl.deciders.base import Answered, Decider, Decisions
from rl.scoring import Scorer
from rl.stages import Stages

COST = "cost.json"
"""File beside a fit's own with the cost of a split."""
BATCH = 16
"""Cases of a step of the fit; each comes with all of its splits."""


class SplitDecider(Decider):
    """A fitted split allocator.

    Args:
        stages: the run. performer: the trained performer of the stage `name`.
        allocator: fitted on the validation cases. cost: of a split.
        folds: fits that each had not seen some of the validation patients; for new cases there need be none.
    """

    form = "split"

    def __init__(
        self,
        stages: Stages,
        performer: Performer,
        name: str,
        allocator: SplitAllocator,
        cost: SplitCost,
        folds: Sequence[SplitAllocator],
    ):
        self.stages, self.performer, self.name = stages, performer, name
        self.allocator, self.folds, self.cost = allocator, folds, cost
        self.ladder = stages.run.ladder
        self.look = CheapLook(performer, allocator.config)
        self._judged: dict[str, list[tuple[Room, list[Split], np.ndarray]]] = {}

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        splits, look = self.splits(cases, price)
        return self._rungs(splits), look

    def splits(self, cases: Sequence[Case], price: float) -> tuple[list[Split], np.ndarray]:
        """Splits of any cases whose slides the performer can see, and the FLOPs (N,) of choosing them.

        They are asked for with `Performer.answer(cases, [sum(s) for s in splits], weights=splits)`.
        """
        return self._best([self._judge(self.allocator, c) for c in cases], [self.allocator] * len(cases), cases, price)

    def decide(self, split: str, price: float) -> Decisions:
        chosen, look = self.decided(split, price)
        return self._decisions(price, chosen, look, self.answers(split, [[s] for s in chosen]))

    def decide_on(
        self, cases: Sequence[Case], price: float, table: ScoreTable, scorer: Scorer, folder: Path
    ) -> Decisions:
        chosen, look = self.splits(cases, price)
        path, asked = folder / f"{self.name}.splits.jsonl", [[s] for s in chosen]
        return self._decisions(
            price, chosen, look, _ask(self.stages, self.performer, path, cases, table, scorer, asked)
        )

    def _decisions(
        self, price: float, chosen: Sequence[Split], look: np.ndarray, answers: Sequence[Sequence[Scored]]
    ) -> Decisions:
        """Of each case (N,) the split that was chosen, FLOPs of choosing it, and the only answer."""
        found = [row for (row,) in answers]
        score, visual, flops = (np.array([getattr(f, k) for f in found]) for k in ("score", "visual", "flops"))
        details = [
            {
                "budget": sum(s),
                "budgets": list(s),
                "completion": f.text,
                "prompt_tokens": f.prompt,
                "generated_tokens": f.generated,
            }
            for s, f in zip(chosen, found, strict=True)
        ]
        return Decisions(price, self._rungs(chosen), score, visual, flops, look, details=details)

    def decided(self, split: str, price: float) -> tuple[list[Split], np.ndarray]:
        """Splits of the cases of `val` or `test` and the FLOPs (N,) of choosing them."""
        cases, models = self.stages.splits[split], self._models(split)
        if split not in self._judged:
            self._judged[split] = [self._judge(m, c) for m, c in zip(models, cases, strict=True)]
        return self._best(self._judged[split], models, cases, price)

    def answers(self, split: str, splits: Sequence[Sequence[Split]]) -> list[list[Scored]]:
        """Answers to the cases of a split at splits of each; those that are not in the run's folder are made."""
        return ask(self.stages, self.performer, self.name, split, splits)

    def predicted(self, split: str) -> np.ndarray:
        return self._even(self._models(split), self.stages.splits[split])

    def values(self, cases: Sequence[Case]) -> np.ndarray:
        return self._even([self.allocator] * len(cases), cases)

    def answer(self, case: Case, price: float) -> Answered:
        start = time.perf_counter()
        (split,), flops = self.splits([case], price)
        return self._answered(case, sum(split), float(flops[0]), start, split)

    def _even(self, models: Sequence[SplitAllocator], cases: Sequence[Case]) -> np.ndarray:
        """Predicted scores (N, rungs) of even splits."""
        rooms = rooms_of(self.performer, cases, self.allocator.config)
        return np.stack([self._value(m, c)(list(r.equal)) for m, c, r in zip(models, cases, rooms, strict=True)])

    def _models(self, split: str) -> list[SplitAllocator]:
        """The allocator that decides about each case of a split."""
        cases = self.stages.splits[split]
        models = [self.allocator] * len(cases)
        if split == "val":
            for fold, (_, held) in zip(self.folds, by_patient([c.patient for c in cases]), strict=True):
                for i in held:
                    models[i] = fold
        return models

    def _judge(self, model: SplitAllocator, case: Case) -> tuple[Room, list[Split], np.ndarray]:
        """What a case may have; its splits and their predicted scores, none where there are too many."""
        (room,) = rooms_of(self.performer, [case], model.config)
        splits = room.all() if room.count <= EXHAUSTIVE else []
        return room, splits, self._value(model, case)(splits) if splits else np.zeros(0)

    def _value(self, model: SplitAllocator, case: Case) -> Callable[[list[Split]], np.ndarray]:
        """What predicts the scores (splits,) of a case."""
        seen = self.look([case])
        return lambda splits: predict(model, *seen, torch.tensor([splits]))[0]

    def _best(
        self,
        judged: Sequence[tuple[Room, list[Split], np.ndarray]],
        models: Sequence[SplitAllocator],
        cases: Sequence[Case],
        price: float,
    ) -> tuple[list[Split], np.ndarray]:
        found, flops = [], []
        for (room, splits, values), model, case in zip(judged, models, cases, strict=True):
            count = len(splits)
            if splits:
                best = splits[int((values - price * self.cost(splits)).argmax())]
            else:
                best, count = greedy(room, self._value(model, case), self.cost, price)
            found.append(best)
            flops.append(model.flops(len(room.levels), count))
        return found, np.array(flops)

    def _rungs(self, splits: Sequence[Split]) -> np.ndarray:
        """Rungs (N,) of the ladder next to the totals of splits, on a log scale."""
        totals = np.log([sum(s) for s in splits])
        return np.abs(totals[:, None] - np.log(self.ladder)).argmin(1)


def slide_ladder(stages: Stages, performer: Performer) -> list[int]:
    """Budgets of a slide: none, and each of the case's divided by the median number of slides of training cases."""
    slides = median(len(performer.sources(c)) for c in stages.splits["train"])
    return sorted({0, *(max(1, round(b / slides)) for b in stages.run.ladder)})


def rooms_of(performer: Performer, cases: Sequence[Case], config: SplitConfig) -> list[Room]:
    """Splits that each case may have."""
    return [Room.of(performer, c, config.slide_ladder, config.ladder) for c in cases]


def ask(
    stages: Stages, performer: Performer, name: str, split: str, splits: Sequence[Sequence[Split]]
) -> list[list[Scored]]:
    """Answers of the stage `name` to the cases of a split at splits of each, kept in `tables/NAME.SPLIT.splits.jsonl`.

    Those of equal shares are in the stage's score table already.
    """
    path, table = stages.run.folder / "tables" / f"{name}.{split}.splits.jsonl", stages.table(name, performer, split)
    return _ask(stages, performer, path, stages.splits[split], table, stages.scorer, splits)


def _ask(
    stages: Stages,
    performer: Performer,
    path: Path,
    cases: Sequence[Case],
    table: ScoreTable,
    scorer: Scorer,
    splits: Sequence[Sequence[Split]],
) -> list[list[Scored]]:
    """Answers from a file or a score table of equal shares; those that neither has are made, and kept in the file."""
    run, kept = stages.run, SplitTable(path)
    kept.take(table, [Room.of(performer, c, [0], run.ladder) for c in cases], run.ladder)
    label = path.name.removesuffix(".jsonl")
    return kept.ask(performer, cases, splits, scorer, stages.max_new_tokens, run.evaluation.batch_size, label)


def fit_split(stages: Stages, performer: Performer, start: LookNetwork, name: str = "grpo") -> SplitDecider:
    """Fit on answers of the validation cases at random splits; a finished fit is read from the run's folder.

    Training cases are left out: what the performer scores on cases it was trained on says little about budgets.

    Args:
        performer: of the stage `name`. start: the jointly trained allocator, whose reading of look and question the
            fit starts from.
    """
    run, options, cases = stages.run, stages.run.allocator, stages.splits["val"]
    folder = run.folder / ("allocator" if name == "grpo" else f"{name}_allocator")
    parts = {**stages.grpo_parts(), "fit": options.settings(), "stage": name}
    patients = [c.patient for c in cases]
    folds = by_patient(patients)
    if is_done(folder, parts):
        saved = [SplitAllocator.from_pretrained(_fold(folder, k)) for k in range(len(folds))]
        return SplitDecider(stages, performer, name, *_read(folder), saved)
    clock = Clock()
    torch.manual_seed(run.grpo.seed)
    shape = {k: getattr(start.config, k) for k in ("feature_dim", "width", "buckets", "dropout", "look_dropout")}
    config = SplitConfig(
        slide_ladder=slide_ladder(stages, performer),
        max_slides=run.performer.max_slides,
        ladder=run.ladder,
        # The coarsest alone: a look at every slide is most of what deciding costs.
        look=start.config.look[:1],
        share="split",
        **shape,
    )
    fresh = SplitAllocator(config)
    fresh.see.load_state_dict(start.see.state_dict())
    fresh.question.load_state_dict(start.question.state_dict())
    rooms = rooms_of(performer, cases, config)
    splits = draw_splits(cases, rooms, options.fit_splits, run.grpo.seed)
    found = ask(stages, performer, name, "val", splits)
    largest = float(np.mean([row[splits[i].index(rooms[i].equal[-1])].flops for i, row in enumerate(found)]))
    cost = SplitCost.fit(splits, [[f.flops for f in row] for row in found], largest)
    budgets = torch.zeros(len(cases), max(map(len, splits)), max(len(r.levels) for r in rooms), dtype=torch.long)
    scores = torch.full(budgets.shape[:2], torch.nan)
    for i, (own, rows) in enumerate(zip(splits, found, strict=True)):
        budgets[i, : len(own), : len(own[0])] = torch.tensor(own)
        scores[i, : len(own)] = torch.tensor([f.score for f in rows])
    inputs = (*CheapLook(performer, config)(cases), budgets)
    fit = {
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "batch_size": BATCH,
        "seed": run.grpo.seed,
    }
    allocator, _, losses = fit_by_patient(
        fresh, *inputs[:2], scores, patients, options.fit_epochs, further=inputs[2:], **fit
    )
    held_out = [copy.deepcopy(fresh) for _ in folds]
    for fold, (seen, _) in zip(held_out, folds, strict=True):
        fit_rows(fold, inputs, scores, seen, int(np.argmin(losses)) + 1, **fit)
    if stages.is_main:
        allocator.save_pretrained(folder)
        for k, fold in enumerate(held_out):
            fold.save_pretrained(_fold(folder, k))
        cost.save(folder / COST)
        mark_done(folder, parts, n=len(cases), splits=int((~scores.isnan()).sum()), loss=losses, seconds=clock.seconds)
    return SplitDecider(stages, performer, name, allocator, cost, held_out)


def load_split(stages: Stages, performer: Performer) -> SplitDecider:
    """Read a finished fit from the run's folder, for new cases; it decides about none that it was fitted on."""
    return SplitDecider(stages, performer, "grpo", *_read(stages.run.folder / "allocator"), [])


def _read(folder: Path) -> tuple[SplitAllocator, SplitCost]:
    return SplitAllocator.from_pretrained(folder), SplitCost.load(folder / COST)


def _fold(folder: Path, number: int) -> Path:
    return folder / "folds" / str(number)
