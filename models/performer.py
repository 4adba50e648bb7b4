"""The task performer: what it sees of a case at a budget, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from envs.case import Case
from models.cost import DecoderShape
from models.processor import SlideProcessor
from models.slide_vlm import SlideVLM
from models.visual import FeatureBank, VisualTokens


@dataclass(frozen=True)
class Answer:
    """One greedy answer and what it cost.

    Args:
        text: completion, special tokens removed.
        visual: realised visual tokens.
        prompt: text tokens of the prompt.
        generated: tokens written.
        seconds: wall time of the batch divided by its rows.
    """

    text: str
    visual: int
    prompt: int
    generated: int
    seconds: float


def question_text(case: Case, show_options: bool) -> str:
    """The question as it is put: the prompt and, if wanted, the options of a choice case."""
    if show_options and case.options:
        return case.prompt + "\nOptions: " + ", ".join(case.options)
    return case.prompt


class Performer:
    """A `SlideVLM` with its processor and the stored features that it reads.

    Args:
        show_options: list a choice case's options after its prompt.
        system: system message, or None.
    """

    def __init__(
        self,
        model: SlideVLM,
        processor: SlideProcessor,
        bank: FeatureBank,
        show_options: bool = True,
        system: str | None = None,
    ):
        self.model, self.processor, self.bank = model, processor, bank
        self.show_options, self.system = show_options, system

    @property
    def shape(self) -> DecoderShape:
        """Shape of the language model, for the cost formula."""
        return DecoderShape.from_config(self.model.config.text_config)

    def sources(self, case: Case) -> tuple[str, ...]:
        """Images and slides of a case, in order."""
        return (*case.images, *case.slides)

    def see(self, case: Case, budget: int) -> list[VisualTokens]:
        """Visual tokens of a case, at most `budget` in all; its images share the budget equally. 0 shows nothing."""
        sources = self.sources(case)
        if budget == 0 or not sources:
            return []
        return [self.bank.see(s, max(1, budget // len(sources))) for s in sources]

    def messages(self, case: Case, visual: Sequence[VisualTokens] = ()) -> list[dict]:
        """Conversation that puts the question; images come before the text."""
        parts: list[dict] = [{"type": "image", "image": v} for v in visual]
        system = [{"role": "system", "content": self.system}] if self.system else []
        parts.append({"type": "text", "text": question_text(case, self.show_options)})
        return [*system, {"role": "user", "content": parts}]

    @torch.no_grad()
    def answer(
        self, cases: Sequence[Case], budgets: Sequence[int], max_new_tokens: int = 64, batch_size: int = 64
    ) -> list[Answer]:
        """Greedy answers of the cases, each at its own budget; rows of like length share a batch."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(cases)), key=lambda i: (budgets[i], len(cases[i].prompt)))
        answers: list[Answer | None] = [None] * len(cases)
        tokenizer = self.processor.tokenizer
        device = self.model.get_input_embeddings().weight.device
        for at in range(0, len(order), batch_size):
            chunk = order[at : at + batch_size]
            start = time.perf_counter()
            seen = [self.see(cases[i], budgets[i]) for i in chunk]
            text = [
                self.processor.apply_chat_template(self.messages(cases[i], v), add_generation_prompt=True)
                for i, v in zip(chunk, seen, strict=True)
            ]
            images = seen if any(seen) else None
            inputs = self.processor(images=images, text=text, padding=True, return_tensors="pt").to(device)
            out = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                suppress_tokens=[self.processor.image_token_id],
            )[:, inputs["input_ids"].shape[1] :]
            seconds = (time.perf_counter() - start) / len(chunk)
            lengths = inputs["attention_mask"].sum(1).tolist()
            for i, visual, length, ids in zip(chunk, seen, lengths, out.tolist(), strict=True):
                end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
                shown = sum(len(v) for v in visual)
                completion = tokenizer.decode(ids[:end], skip_special_tokens=True)
                answers[i] = Answer(completion, shown, int(length) - shown, end, seconds)
        self.model.train(was_training)
        return [a for a in answers if a is not None]

    def save(self, folder: str | Path) -> None:
        """Write model (safetensors), tokenizer and processor to a folder that `load` reads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path, bank: FeatureBank, **options: Any) -> Performer:
        """Read what `save` wrote."""
        model = SlideVLM.from_pretrained(folder)
        return cls(model, SlideProcessor(AutoTokenizer.from_pretrained(folder)), bank, **options)
