"""The allocator that writes a budget: a second adapter of the performer's own model (BiRR4CPath, methods 1.5-1.8).

One base model is in memory. With the adapter off, which is how it is left, it is the performer, bit for bit.

The form `text`: an adapter of the performer writes a budget, and the performer answers at that very one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model

from frugalpath.allocator.base import Allocator, Answered, Decisions, TrainedRun
from frugalpath.allocator.frozen import FrozenAnswers
from frugalpath.allocator.score_table import TableKey
from frugalpath.distributed import is_main, map_over_processes
from frugalpath.envs.case import Case
from frugalpath.errors import InputError
from frugalpath.files import write_text
from frugalpath.models.build import LORA_TARGETS
from frugalpath.models.performer import Performer, question_text
from frugalpath.models.vision_adapter import Prompt, VisualInput
from frugalpath.recipe.checkpoints import is_done
from frugalpath.recipe.run import SYSTEM, TURN
from frugalpath.rewards.answer import extract_answer
from frugalpath.rewards.cost import BIRR_CAP, parse_budget

LEAST, MOST = 2, 8192
"""Limits of a budget, as published (methods 1.7)."""


@dataclass(frozen=True)
class Asked:
    """What the allocator asked for.

    Args:
        text: its completion.
        number: the integer in it, None where it wrote none.
        budget: tokens that the performer is given for it.
        flops: of seeing, reading and writing, those of the adapter with them.
    """

    text: str
    number: int | None
    budget: int
    flops: float


class BudgetWriter:
    """Writes the budget of a case after a look at it.

    Args:
        performer: its model gets the adapter.
        adapter: keys of peft's `LoraConfig`, for a new adapter; or the folder of one that was saved.
        look: tokens of the look. default: budget where no integer is written.

    Raises:
        InputError: an unknown key of the adapter.
    """

    def __init__(self, performer: Performer, adapter: dict[str, Any] | str | Path, look: int, default: int):
        self.performer, self.look, self.default = performer, look, default
        self.asking = performer.reworded(self.messages)
        self._trainable = [p for p in performer.model.parameters() if p.requires_grad]
        if isinstance(adapter, dict):
            # The published rank and scale.
            shape = {"r": 16, "lora_alpha": 64, "target_modules": LORA_TARGETS, **adapter}
            try:
                config = LoraConfig(task_type="CAUSAL_LM", **shape)
            except TypeError as error:
                raise InputError(f"allocator.text.lora: {error}; its keys are those of peft's LoraConfig") from error
            self.model = get_peft_model(performer.model, config)
        else:
            self.model = PeftModel.from_pretrained(performer.model, str(adapter), is_trainable=True)
        self._adapted = sum(p.numel() for n, p in self.model.named_parameters() if "lora_" in n)
        self._speak(False)

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """With the adapter on and all else frozen."""
        self._speak(True)
        try:
            yield
        finally:
            self._speak(False)

    def _speak(self, on: bool) -> None:
        # torch multiplies by weights that take no gradient in another order, which moves the last digits.
        for parameter in self._trainable:
            parameter.requires_grad_(not on)
        if on:
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()

    def native(self, case: Case) -> int:
        """Tokens of a case's images and slides as they are, without any cap."""
        return sum(self.performer.native(source) for source in self.performer.sources(case))

    def messages(self, case: Case, visual: Sequence[VisualInput] = ()) -> list[dict]:
        """The published conversation about a case of which so much is shown."""
        turn = TURN.format(
            current_token=sum(view.tokens for view in visual),
            max_token=self.native(case),
            pathology_prompt=question_text(case, self.performer.show_options),
        )
        parts: list[dict] = [{"type": "image", "image": view} for view in visual]
        return [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [*parts, {"type": "text", "text": turn}]},
        ]

    def prompt(self, case: Case) -> Prompt:
        """The conversation as the model reads it, with the look."""
        return self.asking.prompt(case, self.look)

    def held(self, case: Case, number: int | None) -> int:
        """The budget of a case for an integer that was written: within `LEAST` and `MOST` and what its images give."""
        budget = self.default if number is None else min(max(number, LEAST), MOST)
        room = sum(self.performer.room(source) for source in self.performer.sources(case))
        return int(min(budget, self.native(case), room))

    def ask(self, cases: Sequence[Case], max_new_tokens: int, batch_size: int = 64) -> list[Asked]:
        """What the allocator asks for, written greedily."""
        with self.speaking():
            answers = self.asking.answer(cases, [self.look] * len(cases), max_new_tokens, batch_size)
        asked = []
        for case, answer in zip(cases, answers, strict=True):
            number = read_budget(answer.text)
            passed = answer.visual + answer.prompt + answer.generated - 1
            flops = answer.flops + 2.0 * self._adapted * passed
            asked.append(Asked(answer.text, number, self.held(case, number), flops))
        return asked

    def save(self, folder: str | Path) -> None:
        """Write the adapter (safetensors) to a folder."""
        self.model.save_pretrained(str(folder), selected_adapters=["default"])


def read_budget(completion: Any) -> int | None:
    """The integer in the answer of a completion; None where there is none (methods 1.5)."""
    return parse_budget(extract_answer(completion))


UNREADABLE = 0.1
"""Share of completions without a budget that is warned of."""


class TextAllocator(Allocator):
    """A trained adapter. It knows no price, so that it has one operating point.

    Args:
        trained: the run. writer: trained on the training cases.
    """

    form = "text"
    folder = "text"

    def __init__(self, trained: TrainedRun, writer: BudgetWriter):
        super().__init__(trained)
        self.writer = writer
        own = self.data.run.allocator.text.grpo
        self.tokens: Any = own.get("max_completion_length", self.data.max_new_tokens)
        self._found: dict[str, list[dict[str, Any]]] = {}

    def prices(self, asked: Sequence[float]) -> list[float]:
        return list(asked[:1])

    def choose(self, cases: Sequence[Case], price: float) -> tuple[np.ndarray, np.ndarray]:
        asked = self._ask(cases)
        return self._nearest([a.budget for a in asked]), np.array([a.flops for a in asked])

    def decide(self, split: str, price: float) -> Decisions:
        rows = self._rows(split)
        score, visual, flops, look = (
            np.array([float(row[k]) for row in rows]) for k in ("score", "visual", "flops", "look")
        )
        details = [
            {
                "asked": row["asked"],
                "budget": row["budget"],
                "completion": row["text"],
                "prompt_tokens": row["prompt"],
                "generated_tokens": row["generated"],
            }
            for row in rows
        ]
        rungs = self._nearest([r["budget"] for r in rows])
        return Decisions(price, rungs, score, visual, flops, look, self._look_tokens(split), details)

    def _look_tokens(self, split: str) -> np.ndarray:
        return np.array([float(self.writer.prompt(c).visual) for c in self.data.splits[split]])

    def answer(self, case: Case, price: float) -> Answered:
        start = time.perf_counter()
        (asked,) = self._ask([case])
        return self._answered(case, asked.budget, asked.flops, start)

    def warnings(self) -> list[str]:
        rows = self._rows("val")
        lost = sum(row["number"] is None for row in rows) / len(rows)
        if lost <= UNREADABLE:
            return []
        return [
            f"the allocator writes no budget for {lost:.0%} of the validation cases, which then get "
            f"{self.writer.default} tokens; teach it first: allocator.text.warm_start"
        ]

    def _ask(self, cases: Sequence[Case]) -> list[Asked]:
        return self.writer.ask(cases, self.tokens, self.data.run.evaluation.batch_size)

    def _nearest(self, budgets: Sequence[int]) -> np.ndarray:
        """Rungs (N,) of the ladder nearest to the budgets, by doublings."""
        asked, ladder = np.log2(np.maximum(budgets, 1)), np.log2(self.ladder)
        return abs(asked[:, None] - ladder).argmin(1)

    def _rows(self, split: str) -> list[dict[str, Any]]:
        """What was asked for, answered and paid for every case of a split; kept beside the adapter."""
        if split in self._found:
            return self._found[split]
        cases, path = self.data.splits[split], self.data.run.folder / "text" / f"{split}.jsonl"
        key = asdict(TableKey.of(self.data, text_key(self.trained), cases))
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        # An earlier version kept no key; its rows are known by the names of their cases.
        made_of = rows.pop(0)["made_of"] if rows and "made_of" in rows[0] else {} if rows else None
        same = made_of is not None and made_of.get("answers", key["answers"]) == key["answers"]
        if not same or [row["id"] for row in rows] != [c.id for c in cases]:
            rows = self._answered_rows(cases)
        elif made_of != key:
            texts, budgets, visual = ([row[k] for row in rows] for k in ("text", "budget", "visual"))
            scores = self.data.scorer(texts, cases, budgets, visual)
            rows = [{**row, "score": float(score)} for row, score in zip(rows, scores, strict=True)]
        if made_of != key:
            PartialState().wait_for_everyone()  # all have read it
            if is_main():
                write_text(path, "".join(f"{json.dumps(row)}\n" for row in [{"made_of": key}, *rows]))
        self._found[split] = rows
        return rows

    def _answered_rows(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        answers = FrozenAnswers(
            self.performer, self.data.scorer, self.data.max_new_tokens, self.data.run.evaluation.batch_size
        )
        asked = map_over_processes(cases, self._ask)
        scored = answers(cases, [a.budget for a in asked], together=True)
        return [
            {"id": c.id, "asked": a.text, "number": a.number, "budget": a.budget, "look": a.flops}
            | {"score": s.score, **asdict(s.answer)}
            for c, a, s in zip(cases, asked, scored, strict=True)
        ]


def load_text(trained: TrainedRun) -> TextAllocator:
    """Read the trained adapter from the run's folder."""
    return TextAllocator(trained, read_writer(trained))


def text_key(trained: TrainedRun) -> dict[str, Any]:
    """What the trained adapter depends on."""
    options = trained.data.run.allocator
    return {**trained.key, "text": asdict(options.text), "price": options.price}


def new_writer(trained: TrainedRun, adapter: dict[str, Any] | Path) -> BudgetWriter:
    """A writer of budgets with a new adapter, or with that of a folder."""
    run = trained.data.run
    cap = min(BIRR_CAP, run.ladder[-1])
    return BudgetWriter(trained.performer, adapter, run.allocator.text.look or cap, cap)


def read_writer(trained: TrainedRun) -> BudgetWriter:
    """The writer of the run's folder.

    Raises:
        InputError: other settings were trained.
    """
    if trained.key:
        is_done(trained.data.run.folder / "text", text_key(trained))
    return new_writer(trained, trained.data.run.folder / "text")
