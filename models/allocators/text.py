"""The allocator that writes a budget: a second adapter of the performer's own model (BiRR4CPath, methods 1.5-1.8).

One base model is in memory. With the adapter off, which is how it is left, it is the performer, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from envs.case import Case
from models.build import LORA_TARGETS
from models.performer import Performer, question_text
from models.sight import Prompt, View
from rewards.answer import extract_answer
from rewards.cost import parse_budget
from slides.errors import InputError

SYSTEM = (
    "A conversation between User and Assistant. The assistant first thinks about the reasoning process and then gives "
    "the answer: <think> reasoning process here </think><answer> answer here </answer>."
)
TURN = (
    "Allocate the optimal token number for the image based on the pathology task. Generally, simple images and tasks "
    "receive fewer tokens and complex ones receive more tokens. The current input token number is {current_token} and "
    "a maximum limit is {max_token}. The pathology task is: {pathology_prompt}. The answer should be a positive "
    "integer of the image token number."
)
"""The published turn of the user (methods 1.6)."""
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


class TextAllocator:
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

    def messages(self, case: Case, visual: Sequence[View] = ()) -> list[dict]:
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
